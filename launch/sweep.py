"""A sweep file: what `ddetr tune` searches, checked as a whole before anything starts.

It looks like this (all keys but base, samples and search have defaults):

    base: tiny                        # a preset, or a YAML file in this folder, which may have a base itself
    overrides: [data.train=shards/train, data.validation=shards/val, train.epochs=12]
    metric: AP                        # a score of the evaluation; by default its headline
    mode: max
    samples: 20                       # trials
    concurrent: 4                     # trials at once
    cpus_per_trial: 2
    gpus_per_trial: 0
    search:
      optim.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}
      optim.clip_norm: {uniform: [0.05, 0.5]}
      model.decoder_layers: {integer: [2, 6]}       # both ends included
      model.queries: {choice: [30, 60]}
    scheduler: {asha: {grace_epochs: 1, reduction_factor: 3}}   # stops weak trials early; left out: none is stopped
    seed: 0
    output: runs/sweep                # default: runs/<name of this file>-<time>
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ..core.config import Config, came_with_weights, changed, dump, load
from ..core.evaluation.scores import headline, score_names
from ..core.mistakes import ConfigError, brief, described, listed
from ..core.overrides import written
from ..core.ownership import ORDERS, ForeignSettingError, check_own
from ..data.documents import parse_yaml
from ..data.location import Location

RESERVED = ("train.output", "train.name")  # the sweep gives each trial its own directory
DRAWS = 64  # combinations of the other keys' values among which one must make a value right


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes `true`, `on` and `no` for 1 and 0; only a choice can be between them."""
        for item in value if isinstance(value, list) and info.field_name != "choice" else [value]:
            if isinstance(item, bool):
                raise ValueError(f"expected no {str(item).lower()} here")
        return value


class Distribution(_Part):
    """From what one key's values are drawn: exactly one of the four."""

    choice: list[Any] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_and_ordered(self) -> Self:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(Distribution.model_fields)}, got {list(given) or 'none'}")
        kind, values = given.popitem()
        if kind != "choice" and values[0] >= values[1]:
            raise ValueError(f"{kind}: the lower end must be below the upper one, got {list(values)}")
        if kind == "loguniform" and values[0] <= 0:
            raise ValueError(f"loguniform: both ends must be positive, got {list(values)}")
        return self

    def extremes(self) -> list[Any]:
        """Values that stand for all that may be drawn."""
        return list(self.choice or self.uniform or self.loguniform or self.integer or ())

    def domain(self) -> Any:
        from ray import tune

        if self.choice is not None:
            return tune.choice(self.choice)
        if self.uniform is not None:
            return tune.uniform(*self.uniform)
        if self.loguniform is not None:
            return tune.loguniform(*self.loguniform)
        assert self.integer is not None, "validated: one of the four is given"
        return tune.randint(self.integer[0], self.integer[1] + 1)


class Asha(_Part):
    """Asynchronous successive halving: of the trials that reach a rung, one in `reduction_factor` continues."""

    grace_epochs: int = Field(1, ge=1)
    reduction_factor: int = Field(3, ge=2)


class Scheduler(_Part):
    asha: Asha | None = None


class Sweep(_Part):
    base: str
    overrides: tuple[str, ...] = ()
    metric: str = Field(default_factory=headline)
    mode: Literal["max", "min"] = "max"
    samples: int = Field(gt=0)
    concurrent: int = Field(1, gt=0)
    cpus_per_trial: int = Field(1, gt=0)
    gpus_per_trial: float = Field(0, ge=0, le=1, description="a trial is one process, so at most one")
    search: dict[str, Distribution] = Field(min_length=1)
    scheduler: Scheduler = Scheduler()
    seed: int = Field(0, ge=0)
    output: Location | None = None

    @field_validator("metric")
    @classmethod
    def _is_a_score(cls, metric: str) -> str:
        if metric not in score_names():
            raise ValueError(f"expected one of {', '.join(score_names())}, got {metric!r}")
        return metric


def read_sweep(path: Path) -> tuple[Sweep, Config]:
    """The sweep and the configuration that its trials start from; each searched key and value is tried on it.

    That includes what a run would find out before it starts: shards, model, initial weights. A value is right when some
    values of the other keys make it so.
    Raises ConfigError that lists every mistake, and ForeignSettingError when the file came with weights and has
    privileged settings that are not the user's own.
    """
    foreign = came_with_weights(path)
    try:
        values = parse_yaml(path.read_text(), aliases=not foreign)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys ({', '.join(Sweep.model_fields)}), got {type(values).__name__}")
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        raise listed(str(path), described(error, Sweep, as_paths=False)) from error
    try:
        base = load(sweep.base, sweep.overrides, named_in=path)
    except ConfigError as error:
        raise ConfigError(f"{path}, its base and overrides: {error}") from error
    if foreign:
        check_own(base, ORDERS, (), path)
        orders = [key for key in sweep.search if any(f"{key}.".startswith(f"{order}.") for order in ORDERS)]
        if orders := [*orders, *["output"] * (sweep.output is not None)]:
            raise ForeignSettingError(
                f"{path} came with weights, and sets {', '.join(orders)}: copy it into a folder of your own if you "
                "want that (docs/operations.md, what is trusted)"
            )
    found: list[str] = []
    for key, distribution in sweep.search.items():
        if key in RESERVED:
            found.append(f"search.{key}: the sweep sets it for each trial")
            continue
        others = {name: other for name, other in sweep.search.items() if name not in (key, *RESERVED)}
        for value in distribution.extremes():
            found += _tried(base, key, value, others, lambda config: [])
    if sweep.scheduler.asha and {"train.epochs", "train.evaluate_every_epochs"} & set(sweep.search):
        found.append("search: asha decides how many epochs a trial runs; take train.epochs out, or the scheduler")
    if base.data.train is None or base.data.validation is None:
        found.append("overrides: set data.train and data.validation; a trial is judged by its evaluations")
    if not base.train.evaluate_every_epochs:
        found.append("overrides: train.evaluate_every_epochs must be at least 1; a trial is judged by its evaluations")
    if base.train.device == "cuda" and not sweep.gpus_per_trial:
        found.append("gpus_per_trial: is 0, but train.device=cuda; give a trial a GPU, or set train.device=cpu or auto")
    found = found or _refused(sweep, base)
    if found:
        raise listed(str(path), dict.fromkeys(found))
    return sweep, base


def _refused(sweep: Sweep, base: Config) -> list[str]:
    """What the trials' runs would find out before they start."""
    from .train import check_beforehand

    known: dict[str, list[str]] = {}

    def faults(config: Config) -> list[str]:
        """The optimizer's numbers matter to none of the checks."""
        without = dump(config.model_copy(update={"optim": base.optim}))
        if without not in known:
            try:
                check_beforehand(config, sweep.metric)
                known[without] = []
            except (OSError, ValueError) as error:
                known[without] = [str(error)]
        return known[without]

    of_all = faults(base)
    searched = {key: distribution for key, distribution in sweep.search.items() if not key.startswith("optim.")}
    if not searched:
        return of_all
    found: list[str] = []
    for key, distribution in searched.items():
        others = {name: other for name, other in searched.items() if name != key}
        for value in distribution.extremes():
            refused = _tried(base, key, value, others, faults)
            found += [fault if fault in of_all else f"{brief(written(key, value))}: {fault}" for fault in refused]
    return found


def _tried(
    base: Config,
    key: str,
    value: Any,
    others: dict[str, Distribution],
    faults: Callable[[Config], list[str]],
) -> list[str]:
    """What is wrong with a value of a searched key, given the base; nothing when values of the other keys mend it.

    faults: of a configuration that can be read.
    """

    def tried(drawn: list[str]) -> list[str]:
        try:
            return faults(changed(base, [written(key, value), *drawn], "search"))
        except ConfigError as error:
            return [line.strip() for line in str(error).splitlines()[1:]]

    found, draw = tried([]), random.Random(0)
    for _ in range(DRAWS if found and others else 0):
        if not tried([written(name, draw.choice(other.extremes())) for name, other in others.items()]):
            return []
    return found
