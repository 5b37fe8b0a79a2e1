"""Weights on disk: the safetensors file of each checkpoint, and the published Deformable DETR layout.

A run directory holds checkpoints/step_00001234/, each with model.safetensors: the whole model in float32 under
our names, with configuration, categories, step and epoch in its metadata; training.safetensors: what `--resume` needs
beside that, whole and by parameter; and checkpoint.json, the manifest. Nothing here executes a pickle.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.categories import Categories
from .config import Config, EvalConfig, dump
from .detector import Detector, build
from .published import from_published, published_arguments, published_config, read_published, to_published

WEIGHTS = "model.safetensors"
TRAINING = "training.safetensors"
_STEP = re.compile(r"step_(\d{8})")


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
    metadata = {
        "format": "ddetr",
        "config": dump(config),
        "categories": json.dumps(categories.to_json()),
        "step": str(step),
        "epoch": str(epoch),
    }
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata=metadata)


def load_weights(model: Detector, path: str | Path, *, new_class_head: bool = False) -> list[str]:
    """Fill `model` from a run directory, a checkpoint directory, a safetensors file or a published checkpoint.

    With `new_class_head`, class heads made for another number of classes stay as they are in `model`; the names of
    their tensors are returned. Raises FileNotFoundError when there is no such file, ValueError that lists the
    missing, unexpected and re-shaped names when it belongs to another architecture; the model is unchanged then. For
    a model on the meta device nothing but that is checked.
    """
    file = _weights_file(path)
    weights = _read_safetensors(file)[0] if file.suffix == ".safetensors" else from_published(read_published(file)[0])
    ours = model.state_dict()
    resized = [
        name
        for name, tensor in ours.items()
        if name.startswith("class_embed.") and name in weights and weights[name].shape != tensor.shape
    ]
    if new_class_head:
        weights |= {name: ours[name] for name in resized}
    _check(ours, weights, file, ", or start the class heads anew with train.new_class_head=true" if resized else "")
    if not any(tensor.is_meta for tensor in ours.values()):
        model.load_state_dict(weights)
    return resized


def load_parameters(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """What a checkpoint has of each trained parameter, by name.

    kind: "weights" that training goes on with, their "average", which the model's file holds where there is one, or one
    of the optimizer's averages.
    """
    with safe_open(checkpoint / TRAINING, framework="pt") as opened:
        stored = set(opened.keys())
        trained = [name.removeprefix("exp_avg/") for name in stored if name.startswith("exp_avg/")]
        if kind not in ("weights", "average") or f"{kind}/{trained[0]}" in stored:
            return {name: opened.get_tensor(f"{kind}/{name}") for name in trained}
    with safe_open(checkpoint / WEIGHTS, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in trained}


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> TrainedDetector:
    """Build the model that the checkpoint describes, with its weights, on `device`, ready for inference.

    For a published checkpoint the configuration is read off the tensors' shapes.
    Raises what `load_weights` raises, and ValueError for a safetensors file that `ddetr` did not write.
    """
    file = _weights_file(path)
    if file.suffix != ".safetensors":
        published, arguments = read_published(file)
        model_config = published_config(published, arguments, file)
        top_k = min(EvalConfig().top_k, model_config.queries * model_config.num_classes)
        config = Config(model=model_config, eval=EvalConfig(top_k=top_k))
        model = _build(config, from_published(published), file, device)
        return TrainedDetector(model, config, None, None, None, file)
    weights, metadata = _read_safetensors(file)
    if metadata.get("format") != "ddetr":
        raise ValueError(f"{file}: was not written by ddetr; its metadata names no configuration")
    config = Config.model_validate(yaml.safe_load(metadata["config"]))
    categories = Categories.from_json(json.loads(metadata["categories"]))
    model = _build(config, weights, file, device)
    return TrainedDetector(model, config, categories, int(metadata["step"]), int(metadata["epoch"]), file)


def export_published(model: Detector, path: str | Path) -> None:
    """Write the published layout, in which heads that are one here stand once per layer.

    That is {"model": state_dict, "args": dictionary}, the arguments those that no tensor's shape tells.
    """
    torch.save({"model": to_published(model), "args": published_arguments(model)}, path)


def _build(config: Config, weights: dict[str, Tensor], file: Path, device: str | torch.device) -> Detector:
    without_download = config.model.model_copy(update={"pretrained_backbone": False})
    model = build(without_download)
    _check(model.state_dict(), weights, file)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def _check(ours: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path, hint: str = "") -> None:
    mistakes = [f"missing: {name}" for name in ours if name not in weights]
    mistakes += [f"unexpected: {name}" for name in weights if name not in ours]
    mistakes += [
        f"re-shaped: {name} is {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in ours.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if mistakes:
        shown = "\n".join(f"  {mistake}" for mistake in mistakes[:12])
        more = f"\n  and {len(mistakes) - 12} more" if len(mistakes) > 12 else ""
        raise ValueError(
            f"{file}: holds another architecture than the configuration describes; {len(mistakes)} tensor(s) "
            f"differ:\n{shown}{more}\nSet the model section to what the checkpoint was trained with{hint}."
        )


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.is_file() else find_checkpoint(path) / WEIGHTS


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
