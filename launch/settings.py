"""The settings of a finished or running run, from its config.yaml alone, perhaps one of another release."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from ..core.config import Config, ConfigError, parse, without_logins
from ..data.documents import parse_yaml
from .charts import number
from .console import brief

MISTAKES = 5  # at most so many of a file are told


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    text: str  # YAML, without logins
    config: Config | None  # None where this release cannot read it
    fault: str  # why not, in one line

    @staticmethod
    def of(path: Path) -> "Settings":
        """Raises ValueError that names the file when it is no YAML."""
        try:
            values = parse_yaml(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        text = yaml.safe_dump(without_logins(values), sort_keys=False, allow_unicode=True)
        try:
            return Settings(text, parse(text, path.name), "")
        except ConfigError as error:
            first, *mistakes = (line.strip() for line in str(error).split("\n"))
            told = "; ".join(mistakes[:MISTAKES]) + ("; and more" if len(mistakes) > MISTAKES else "")
            return Settings(text, None, f"{first} {told}".rstrip())


def in_short(config: Config) -> str:
    """The settings that distinguish runs."""
    model, train = config.model, config.train
    deformable = model.architecture == "deformable_detr"
    variants = {
        "two-stage": model.two_stage,
        "box refinement": model.box_refine,
        "single-scale": deformable and model.levels == 1,
        "no multi-scale attention": not model.multi_scale_attention,
        "DC5": model.dilation,
    }
    kind = ", ".join(name for name, holds in variants.items() if holds)
    facts = (
        ("Deformable DETR" if deformable else "DETR") + (f" ({kind})" if kind else ""),
        brief(model.backbone),
        f"{model.queries} queries",
        f"batch {train.batch_size}",
        f"learning rate {number(config.optim.learning_rate)}",
        train.precision,
        f"ZeRO {train.zero_stage}",
    )
    return " · ".join(facts)
