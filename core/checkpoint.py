"""Weights on disk: the safetensors file of each checkpoint, and the published Deformable DETR layout.

A run directory holds checkpoints/step_00001234/, each with model.safetensors: the whole model in float32 under
our names, with configuration, categories, step and epoch in its metadata; training.safetensors: what `--resume` needs
beside that, whole and by parameter; and checkpoint.json, the manifest. Nothing here executes a pickle.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.categories import Categories
from ..data.documents import parse_json
from ..data.text import visible
from .config import Config, ConfigError, EvalConfig, changed, dump, parse, without_logins
from .detector import Detector, build
from .ownership import check_own
from .published import from_published, published_arguments, published_config, read_published, to_published

WEIGHTS = "model.safetensors"
TRAINING = "training.safetensors"
_STEP = re.compile(r"step_(\d{8})")

Shapes = dict[str, tuple[int, ...]]


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
    """The complete checkpoints of a run, oldest first."""
    return sorted(
        path
        for path in (run_directory / "checkpoints").glob("step_*")
        if _STEP.fullmatch(path.name) and (path / WEIGHTS).is_file()
    )


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete checkpoint of a run directory, or `path` itself when it is one.

    Raises FileNotFoundError that says what was looked for.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint here; expected checkpoints/step_*/{WEIGHTS} or {WEIGHTS}")
    return found[-1]


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


def load_weights(model: Detector, path: str | Path, *, new_class_head: bool = False) -> list[str]:
    """Fill `model` from a run directory, a checkpoint directory, a safetensors file or a published checkpoint.

    With `new_class_head`, class heads made for another number of classes stay as they are in `model`; the names of
    their tensors are returned. Raises FileNotFoundError when there is no such file, ValueError that lists the
    missing, unexpected and re-shaped names when it belongs to another architecture, and that names the first tensor
    with a value that is not finite; the model is unchanged then. For a model on the meta device nothing but that is
    checked.
    """
    file = _weights_file(path)
    weights = _read_safetensors(file) if file.suffix == ".safetensors" else from_published(read_published(file)[0])
    ours = model.state_dict()
    resized = [
        name
        for name, tensor in ours.items()
        if name.startswith("class_embed.") and name in weights and weights[name].shape != tensor.shape
    ]
    if new_class_head:
        weights |= {name: ours[name] for name in resized}
    _check(
        model,
        _shapes(weights),
        file,
        ", or start the class heads anew with train.new_class_head=true" if resized else "",
    )
    _check_finite(weights, file)
    if not any(tensor.is_meta for tensor in ours.values()):
        model.load_state_dict(weights)
    return resized


def load_parameters(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """What a checkpoint has of each trained parameter, by name.

    kind: "weights" that training goes on with, their "average", which the model's file holds where there is one, or one
    of the optimizer's averages. Raises ValueError for a file that cannot be read or a value that is not finite.
    """
    file = checkpoint / TRAINING
    with _opened(file) as opened:
        stored = set(opened.keys())
        trained = [name.removeprefix("exp_avg/") for name in stored if name.startswith("exp_avg/")]
        if kind not in ("weights", "average") or f"{kind}/{trained[0]}" in stored:
            found = {name: opened.get_tensor(f"{kind}/{name}") for name in trained}
            _check_finite(found, file)
            return found
    with _opened(checkpoint / WEIGHTS) as opened:
        found = {name: opened.get_tensor(name) for name in trained}
    _check_finite(found, checkpoint / WEIGHTS)
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
    checkpoint, ConfigError for mistakes in configuration or overrides, and ValueError for a file that is no
    checkpoint, and for overrides of the model, which the weights have fixed.
    """
    file = _weights_file(path)
    if file.suffix != ".safetensors":
        published, arguments = read_published(file)
        model_config = published_config(published, arguments, file)
        top_k = min(EvalConfig().top_k, model_config.queries * model_config.num_classes)
        stored, categories, step, epoch = Config(model=model_config, eval=EvalConfig(top_k=top_k)), None, None, None
        weights = from_published(published)
        shapes = _shapes(weights)
    else:
        weights = None
        with _opened(file) as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        if metadata.get("format") != "ddetr":
            raise ValueError(f"{file}: was not written by ddetr; its metadata names no configuration")
        try:
            settings = [override for override in overrides if not override.strip().startswith("model.")]
            stored = _with_logins(parse(metadata["config"], str(file), settings), file)
            categories = Categories.from_json(parse_json(metadata["categories"]))
            step, epoch = int(metadata["step"]), int(metadata["epoch"])
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: its metadata cannot be used: {type(error).__name__}: {error}") from error
    config = changed(stored, overrides, str(path))
    fixed = [f"model.{name}" for name, value in stored.model if getattr(config.model, name) != value]
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: the weights in {file} fix the model; leave the override out")
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
    found = contents(path, overrides)
    if config is None:
        config = found.config
        check_own(config, ("model.backbone", "data.most_pixels"), overrides, found.file)
    without_download = config.model.model_copy(update={"pretrained_backbone": False})
    with torch.device("meta"):
        _check(build(without_download), found.shapes, found.file)
    model = build(without_download)
    weights = _read_safetensors(found.file) if found.weights is None else found.weights
    _check_finite(weights, found.file)
    model.load_state_dict(weights)
    model.to(device).eval().requires_grad_(False)
    return TrainedDetector(model, config, found.categories, found.step, found.epoch, found.file)


def export_published(model: Detector, path: str | Path) -> None:
    """Write the published layout, in which heads that are one here stand once per layer.

    That is {"model": state_dict, "args": dictionary}, the arguments those that no tensor's shape tells.
    """
    torch.save({"model": to_published(model), "args": published_arguments(model)}, path)


def _check(model: Detector, stored: Shapes, file: Path, hint: str = "") -> None:
    ours = _shapes(model.state_dict())
    mistakes = [f"missing: {name}" for name in ours if name not in stored]
    mistakes += [f"unexpected: {name}" for name in stored if name not in ours]
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
            f"differ:\n{shown}{more}\nSet the model section to what the checkpoint was trained with{hint}."
        )


def _check_finite(weights: Mapping[str, Tensor], file: Path) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and (bad := tensor.numel() - int(tensor.isfinite().sum())):
            raise ValueError(
                f"{file}: {visible(name)} has {bad} of {tensor.numel()} values that are infinite or not a number; what "
                f"it was trained in had diverged. Take an earlier checkpoint"
            )


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
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
