"""Weights on disk: the safetensors file of each checkpoint, and the published Deformable DETR layout.

A run directory holds checkpoints/step_00001234/, each with model.safetensors: the whole model in float32 under
our names, with configuration, categories, step and epoch in its metadata; training.safetensors: what `--resume` needs
beside that, whole and by parameter; and checkpoint.json, the manifest. Nothing here executes a pickle.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...data.categories import Categories
from ...data.documents import parse_json
from ...data.text import visible
from ...data.values import member, whole
from ..config import Config, ConfigError, EvalConfig, ModelConfig, brief, changed, dump, parse, without_logins
from ..model.detector import Detector, build
from ..model.finite import check_finite
from ..overrides import written
from ..ownership import check_own
from .labels import check_shared, continued_heads, label_map
from .manifest import damaged
from .published import (
    Published,
    from_published,
    is_published,
    published_arguments,
    published_categories,
    published_config,
    read_published,
    to_published,
    unwrapped,
)

log = logging.getLogger("ddetr")

WEIGHTS = "model.safetensors"
TRAINING = "training.safetensors"
_STEP = re.compile(r"step_(\d{8})")

# What the names of all our tensors begin with.
PARTS = ("backbone", "input_proj", "transformer", "query_embed", "class_embed", "bbox_embed")

Shapes = dict[str, tuple[int, ...]]
Described = TypeVar("Described")
Found = TypeVar("Found")


@dataclass(frozen=True)
class TrainedDetector:
    """A detector ready for inference and what is known about it."""

    model: Detector  # in eval mode
    config: Config
    categories: Categories | None  # None: published weights, whose label is the COCO category id itself
    step: int | None
    epoch: int | None
    path: Path


def step_directory(run_directory: Path, step: int) -> Path:
    return run_directory / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One that lost a file later, or was copied in part, is among them."""
    return sorted(path for path in (run_directory / "checkpoints").glob("step_*") if _STEP.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint of a run directory, or `path` itself when it is one.

    Raises FileNotFoundError that says what was looked for, and ValueError when the newest one has no weights.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint here; expected checkpoints/step_*/{WEIGHTS} or {WEIGHTS}")
    if not (found[-1] / WEIGHTS).is_file():
        if not found[-1].exists():  # its run has deleted it meanwhile
            return find_checkpoint(path)
        raise ValueError(damaged(found[-1], f"{WEIGHTS} is missing"))
    return found[-1]


def read_newest(path: str | Path, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of the file of weights that `path` means: itself, or that of a run's newest checkpoint.

    A run may go on meanwhile and delete old checkpoints: where the file is gone when it is read, the newest one is
    looked for again. Raises FileNotFoundError when there is none, and what `read` raises about a file that is there.
    """
    while True:
        file = _weights_file(path)
        try:
            return read(file)
        except (OSError, ValueError):
            if file.exists():
                raise


def save_weights(
    path: Path, weights: Mapping[str, Tensor], config: Config, categories: Categories, step: int, epoch: int
) -> None:
    """Write a file of weights that says what they are, and no login of the addresses that they were trained from."""
    metadata = {
        "format": "ddetr",
        "config": dump(config, for_others=True),
        "categories": json.dumps(categories.to_json()),
        "step": str(step),
        "epoch": str(epoch),
    }
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata=metadata)


def load_weights(
    model: Detector,
    path: str | Path,
    *,
    new_class_head: bool = False,
    categories: Categories | None = None,
    tell: Callable[[str], None] = log.warning,
) -> list[str]:
    """Fill `model` from a run directory, a checkpoint directory, a safetensors file or a published checkpoint.

    categories: what the model's labels mean. Where the file says what its own mean, rows of the class heads go to the
    labels of the same name. With `new_class_head` those heads stay as they are in `model`; the names of their tensors
    are returned. `tell` is given what there is to know of the file in one line each: which of several state dicts was
    taken, foreign tensors that were left out, classes kept, moved and started anew.

    Raises FileNotFoundError when there is no such file, ValueError that lists the missing, unexpected and re-shaped
    names when it belongs to another architecture, that names the first tensor with a value that is not finite, or when
    no class goes on; the model is unchanged then. For a model on the meta device nothing but that is checked.
    """
    file, (weights, stored_categories) = read_newest(path, lambda file: (file, _stored_weights(file, tell)))
    check_finite(weights, file)
    ours = model.state_dict()
    heads = [name for name in ours if name.startswith("class_embed.")]
    if new_class_head:
        weights |= {name: ours[name] for name in heads if name in weights}
    elif categories is not None and stored_categories is not None:
        labels = label_map(stored_categories, categories)
        check_shared(labels, stored_categories, file, tell)
        weights |= continued_heads(weights, ours, model.config, labels)
    foreign = _check(model, _shapes(weights), file)
    if foreign:
        shown = ", ".join(map(visible, foreign[:8])) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        tell(f"{file}: left out, no part of this detector: {shown}")
    if not any(tensor.is_meta for tensor in ours.values()):
        model.load_state_dict({name: weights[name] for name in ours})
    return heads if new_class_head else []


def _stored_weights(file: Path, tell: Callable[[str], None]) -> tuple[dict[str, Tensor], Categories | None]:
    """The tensors of a file under our names, and what the labels of their class heads mean, if that is known."""
    if file.suffix == ".safetensors":
        with _opened(file) as opened:
            weights = unwrapped({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
            described = (opened.metadata() or {}).get("categories")
        if described is not None:
            return weights, _described_by(file, lambda: Categories.from_json(parse_json(described)))
        weights = from_published(weights) if is_published(weights) else weights
    else:
        published = read_published(file)
        if published.taken:
            tell(published.taken)
        weights = from_published(published.weights)
    classes = [len(tensor) for name, tensor in weights.items() if re.fullmatch(r"class_embed\.(0\.)?bias", name)]
    return weights, published_categories(classes[0]) if classes else None


def load_parameters(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """What a checkpoint has of each trained parameter, by name.

    kind: "weights" that training goes on with, their "average", which the model's file holds where there is one, or one
    of the optimizer's averages. Raises ValueError for a file that cannot be read or a value that is not finite.
    """
    file = checkpoint / TRAINING
    with _opened(file) as opened:
        stored = set(opened.keys())
        trained = [name.removeprefix("exp_avg/") for name in stored if name.startswith("exp_avg/")]
        if not trained:
            raise ValueError(damaged(checkpoint, f"{TRAINING} has no state of the optimizer"))
        if kind not in ("weights", "average") or f"{kind}/{trained[0]}" in stored:
            found = {name: opened.get_tensor(f"{kind}/{name}") for name in trained}
            check_finite(found, file)
            return found
    with _opened(checkpoint / WEIGHTS) as opened:
        found = {name: opened.get_tensor(name) for name in trained}
    check_finite(found, checkpoint / WEIGHTS)
    return found


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says of itself. shapes: of its tensors, under our names."""

    file: Path
    config: Config
    categories: Categories | None
    step: int | None
    epoch: int | None
    shapes: Shapes
    weights: dict[str, Tensor] | None  # where they had to be read for that


def contents(path: str | Path, overrides: Sequence[str] = ()) -> Contents:
    """Read a checkpoint's description, with overrides applied to its configuration; nothing is built or acted on.

    For a published checkpoint the configuration is read off the tensors' shapes. Raises FileNotFoundError without a
    checkpoint, ConfigError for mistakes in configuration or overrides, those of the model among them, which the weights
    have fixed, and ValueError for a file that is no checkpoint.
    """
    return read_newest(path, lambda file: _contents(file, overrides))


def _contents(file: Path, overrides: Sequence[str]) -> Contents:
    weights, metadata = None, {}
    if file.suffix == ".safetensors":
        with _opened(file) as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    if metadata.get("format") != "ddetr":
        published = (
            read_published(file) if file.suffix != ".safetensors" else Published(_read_safetensors(file), {}, None)
        )
        if file.suffix == ".safetensors" and not is_published(unwrapped(published.weights)):
            raise ValueError(f"{file}: was not written by ddetr; its metadata names no configuration")
        if published.taken:
            log.warning("%s", published.taken)
        named = unwrapped(published.weights)
        model_config = published_config(named, published.arguments, file)
        top_k = min(EvalConfig().top_k, model_config.queries * model_config.num_classes)
        stored, categories, step, epoch = Config(model=model_config, eval=EvalConfig(top_k=top_k)), None, None, None
        weights = from_published(named)
        shapes = _shapes(weights)
    else:
        settings = [override for override in overrides if not override.strip().startswith("model.")]

        stored, categories, step, epoch = _described_by(
            file,
            lambda: (
                _with_logins(parse(member(metadata, "config", str), str(file), settings), file),
                Categories.from_json(parse_json(member(metadata, "categories", str))),
                whole({"step": int(member(metadata, "step", str))}, "step"),
                whole({"epoch": int(member(metadata, "epoch", str))}, "epoch"),
            ),
        )
    config = changed(stored, overrides, str(file))
    fixed = [f"model.{name}" for name, value in stored.model if getattr(config.model, name) != value]
    if fixed:
        raise ConfigError(f"{', '.join(fixed)}: the weights in {file} fix the model; leave the override out")
    return Contents(file, config, categories, step, epoch, shapes, weights)


def _with_logins(stored: Config, file: Path) -> Config:
    """Addresses as the config.yaml of the checkpoint's run has them: weights, which are handed on, hold no logins."""
    own = file.parent.parent.parent / "config.yaml"
    if file.parent.parent.name != "checkpoints" or not own.is_file():
        return stored
    with contextlib.suppress(ValueError, OSError):  # weights can be used without
        data = parse(own.read_text(), str(own)).data
        same = {
            key: getattr(data, key)
            for key in ("train", "validation")
            if getattr(data, key) and without_logins(getattr(data, key)) == getattr(stored.data, key)
        }
        return stored.model_copy(update={"data": stored.data.model_copy(update=same)})
    return stored


def load_detector(
    path: str | Path,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    config: Config | None = None,
) -> TrainedDetector:
    """Build the model that the checkpoint describes, with its weights, on `device`, ready for inference.

    overrides: of its configuration, section.key=value. config: what to take for that configuration, the user's own;
    for checkpoints of the run that asks. Raises what `contents` raises; ForeignSettingError for a backbone to be
    fetched from elsewhere that is not the user's word; ValueError, before any memory is taken, when the configuration
    describes another or a larger model than the tensors are, and for a value that is not finite.
    """
    return read_newest(path, lambda file: _loaded(file, device, overrides, config))


def _loaded(file: Path, device: str | torch.device, overrides: Sequence[str], config: Config | None) -> TrainedDetector:
    found = _contents(file, overrides)
    if config is None:
        config = found.config
        check_own(config, ("model.backbone", "data.most_pixels"), overrides, found.file)
    without_download = config.model.model_copy(update={"pretrained_backbone": False})
    with torch.device("meta"):
        foreign = _check(build(without_download), found.shapes, found.file)
    model = build(without_download)
    weights = _read_safetensors(found.file) if found.weights is None else found.weights
    check_finite(weights, found.file)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in foreign})
    model.to(device).eval().requires_grad_(False)
    return TrainedDetector(model, config, found.categories, found.step, found.epoch, found.file)


def export_published(model: Detector, path: str | Path) -> None:
    """Write the published layout, in which heads that are one here stand once per layer.

    That is {"model": state_dict, "args": dictionary}, the arguments those that no tensor's shape tells.
    """
    torch.save({"model": to_published(model), "args": published_arguments(model)}, path)


def _check(model: Detector, stored: Shapes, file: Path) -> list[str]:
    """Tensors of the file that are no part of any detector of ours. Raises ValueError when the others do not fit."""
    ours = _shapes(model.state_dict())
    foreign = [name for name in stored if name.split(".")[0] not in PARTS]
    mistakes = [f"missing: {name}" for name in ours if name not in stored]
    mistakes += [f"unexpected: {name}" for name in stored if name not in ours and name not in foreign]
    mistakes += [
        f"re-shaped: {name} is {stored[name]} in the file, {shape} in the model"
        for name, shape in ours.items()
        if name in stored and stored[name] != shape
    ]
    if mistakes:
        shown = "\n".join(f"  {visible(mistake)}" for mistake in mistakes[:12])
        more = f"\n  and {len(mistakes) - 12} more" if len(mistakes) > 12 else ""
        raise ValueError(
            f"{file}: holds another architecture than the configuration describes; {len(mistakes)} tensor(s) "
            f"differ:\n{shown}{more}\n{_advice(file, model.config, stored)}"
        )
    return foreign


def _advice(file: Path, config: ModelConfig, stored: Shapes) -> str:
    """How to bring a file's weights and a configuration together, from what the file says of itself."""
    if not any(name.split(".")[0] in PARTS for name in stored):
        return "None of its tensors has a name of this detector: it is the checkpoint of another program."
    try:
        theirs = contents(file).config.model
    except ValueError as error:
        return f"It does not say which model it is of ({str(error).splitlines()[0]})."
    differing = [
        written(f"model.{key}", value)
        for key, value in theirs.model_dump(mode="json").items()
        if value != getattr(config, key) and key not in ("pretrained_backbone", "dropout")
    ]
    if differing == [f"model.num_classes={theirs.num_classes}"]:
        return "Only the number of classes differs: start the class heads anew with train.new_class_head=true."
    hint = (
        ", and start the class heads anew with train.new_class_head=true"
        if theirs.num_classes != config.num_classes
        else ""
    )
    wanted = [setting for setting in differing if not setting.startswith("model.num_classes=")]
    if not wanted:
        return "Its own description fits the configuration, so the file was changed or cut after it was written."
    return f"The file is of a model with {' '.join(map(visible, wanted))}: set that{hint}."


def _described_by(file: Path, read: Callable[[], Described]) -> Described:
    """What a file's metadata says. Raises ValueError when it cannot be used."""
    try:
        return read()
    except ConfigError:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: its metadata cannot be used: {brief(str(error))}") from error


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.is_file() else find_checkpoint(path) / WEIGHTS


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with _opened(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({brief(str(error))})") from error
