"""Weights on disk: the safetensors file of each checkpoint, and the published Deformable DETR layout.

A run directory holds checkpoints/step_00001234/, each with model.safetensors: the whole model in float32 under
our names, with configuration, categories, step and epoch in its metadata. DeepSpeed's own files beside it serve
`--resume` only. Nothing here executes a pickle.
"""

import argparse
import json
import pickle
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
from .config import Config, EvalConfig, ModelConfig, dump
from .detector import DeformableDetr

WEIGHTS = "model.safetensors"
_PUBLISHED = {"transformer.level_embed.weight": "transformer.level_embed"}
_OURS = {published: ours for ours, published in _PUBLISHED.items()}
_STEP = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class TrainedDetector:
    """A detector ready for inference and what is known about it."""

    model: DeformableDetr  # in eval mode
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


def load_weights(model: DeformableDetr, path: str | Path) -> None:
    """Fill `model` from a run directory, a checkpoint directory, a safetensors file or a published checkpoint.

    Raises FileNotFoundError when there is none, ValueError that lists the missing, unexpected and re-shaped names
    when the file belongs to another architecture; the model is unchanged then.
    """
    file = _weights_file(path)
    weights = _read_safetensors(file)[0] if file.suffix == ".safetensors" else _from_published(_read_published(file))
    _fill(model, weights, file)


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> TrainedDetector:
    """Build the model that the checkpoint describes, with its weights, on `device`, ready for inference.

    For a published checkpoint the configuration is read off the tensors' shapes.
    Raises what `load_weights` raises, and ValueError for a safetensors file that `ddetr` did not write.
    """
    file = _weights_file(path)
    if file.suffix != ".safetensors":
        published = _read_published(file)
        model_config = _published_config(published, file)
        top_k = min(EvalConfig().top_k, model_config.queries * model_config.num_classes)
        config = Config(model=model_config, eval=EvalConfig(top_k=top_k))
        return TrainedDetector(_build(config, _from_published(published), file, device), config, None, None, None, file)
    weights, metadata = _read_safetensors(file)
    if metadata.get("format") != "ddetr":
        raise ValueError(f"{file}: was not written by ddetr; its metadata names no configuration")
    config = Config.model_validate(yaml.safe_load(metadata["config"]))
    categories = Categories.from_json(json.loads(metadata["categories"]))
    model = _build(config, weights, file, device)
    return TrainedDetector(model, config, categories, int(metadata["step"]), int(metadata["epoch"]), file)


def export_published(model: DeformableDetr, path: str | Path) -> None:
    """Write the published layout, {"model": state_dict}, in which heads that are one here stand once per layer."""
    torch.save({"model": to_published(model)}, path)


def to_published(model: DeformableDetr) -> dict[str, Tensor]:
    """The published names and the tensors they hold."""
    config = model.config
    weights = {}
    for name, tensor in model.state_dict().items():
        name = _PUBLISHED.get(name) or re.sub(r"^backbone\.body\.", "backbone.0.body.", name)
        head = re.match(r"(class_embed|bbox_embed)\.0\.(.*)", name)
        if head and not config.box_refine:  # one shared head, listed under every layer
            for layer in range(config.decoder_layers):
                weights[f"{head[1]}.{layer}.{head[2]}"] = tensor
            continue
        weights[name] = tensor
        if (config.box_refine and name.startswith("bbox_embed.")) or (
            config.two_stage and name.startswith("class_embed.")
        ):
            weights[f"transformer.decoder.{name}"] = tensor  # the decoder of the original holds them as well
    return weights


def _build(config: Config, weights: dict[str, Tensor], file: Path, device: str | torch.device) -> DeformableDetr:
    without_download = config.model.model_copy(update={"pretrained_backbone": False})
    model = DeformableDetr(without_download)
    _fill(model, weights, file)
    return model.to(device).eval().requires_grad_(False)


def _fill(model: DeformableDetr, weights: Mapping[str, Tensor], file: Path) -> None:
    ours = model.state_dict()
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
            f"differ:\n{shown}{more}\nSet the model section to what the checkpoint was trained with."
        )
    model.load_state_dict(dict(weights))


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.is_file() else find_checkpoint(path) / WEIGHTS


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


def _read_published(file: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the published files hold their arguments so
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: neither safetensors nor a checkpoint of plain tensors ({reason})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{file}: expected the published layout, a dictionary with a state_dict under 'model'")
    return content["model"]


def _from_published(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from the published ones: copies of heads are dropped, batch counters too."""
    refined = any(name.startswith("transformer.decoder.bbox_embed.") for name in published)
    weights = {}
    for name, tensor in published.items():
        if name.startswith("transformer.decoder.") and ("bbox_embed" in name or "class_embed" in name):
            continue
        if name.endswith("num_batches_tracked"):
            continue
        if not refined and re.match(r"(class_embed|bbox_embed)\.[1-9]", name):
            continue
        weights[_OURS.get(name) or re.sub(r"^backbone\.0\.body\.", "backbone.body.", name)] = tensor
    return weights


def _published_config(published: Mapping[str, Tensor], file: Path) -> ModelConfig:
    def count(pattern: str) -> int:
        return len({match[1] for name in published if (match := re.match(pattern, name))})

    try:
        hidden_dim = published["transformer.level_embed"].shape[1]
        levels = published["transformer.level_embed"].shape[0]
        logits = published["transformer.encoder.layers.0.self_attn.attention_weights.bias"].shape[0]
        two_stage = "transformer.pos_trans.weight" in published
        heads = 8  # not visible in any shape; every published model has 8
        # A two-stage model has no query embedding; its number of proposals is free, 300 as published.
        queries = 300 if two_stage else published["query_embed.weight"].shape[0]
        return ModelConfig(
            backbone="resnet50.tv_in1k" if "backbone.0.body.layer1.0.conv3.weight" in published else "resnet18.tv_in1k",
            pretrained_backbone=False,
            hidden_dim=hidden_dim,
            heads=heads,
            levels=levels,
            points=logits // (heads * levels),
            encoder_layers=count(r"transformer\.encoder\.layers\.(\d+)\."),
            decoder_layers=count(r"transformer\.decoder\.layers\.(\d+)\."),
            feedforward_dim=published["transformer.encoder.layers.0.linear1.bias"].shape[0],
            box_refine="transformer.decoder.bbox_embed.0.layers.0.weight" in published,
            two_stage=two_stage,
            num_classes=published["class_embed.0.bias"].shape[0],
            queries=queries,
        )
    except KeyError as error:
        raise ValueError(f"{file}: not a Deformable DETR checkpoint, it has no {error.args[0]}") from error
