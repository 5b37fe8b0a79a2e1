"""The layout of published checkpoints, Deformable DETR's and DETR's: {"model": state_dict} under their own names.

Reading runs no code of the file's: tensors and plain values only.
"""

import argparse
import logging
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError
from torch import Tensor

from ...data.categories import Categories
from ...data.text import visible
from ..config import ModelConfig
from ..mistakes import brief
from ..model.detector import Detector

log = logging.getLogger("ddetr")
_PUBLISHED = {"transformer.level_embed.weight": "transformer.level_embed"}
_OURS = {published: ours for ours, published in _PUBLISHED.items()}


def to_published(model: Detector) -> dict[str, Tensor]:
    """The model's tensors under the published names."""
    config = model.config
    one_head = config.architecture == "deformable_detr" and not config.box_refine  # shared, listed under every layer
    weights = {}
    for name, tensor in model.state_dict().items():
        name = _PUBLISHED.get(name) or re.sub(r"^backbone\.body\.", "backbone.0.body.", name)
        head = re.match(r"(class_embed|bbox_embed)\.0\.(.*)", name)
        if head and one_head:
            for layer in range(config.decoder_layers):
                weights[f"{head[1]}.{layer}.{head[2]}"] = tensor
            continue
        weights[name] = tensor
        if (config.box_refine and name.startswith("bbox_embed.")) or (
            config.two_stage and name.startswith("class_embed.")
        ):
            weights[f"transformer.decoder.{name}"] = tensor  # the decoder of the original holds them as well
    return weights


def published_arguments(model: Detector) -> dict[str, Any]:
    """The settings that no tensor's shape determines, under the published argument's name where there is one."""
    config = model.config
    return {
        "dilation": config.dilation,
        "nheads": config.heads,
        "num_queries": config.queries,
        "num_feature_levels": config.levels,
        "two_stage": config.two_stage,
        "with_box_refine": config.box_refine,
        "classification": config.classification,
        "multi_scale_attention": config.multi_scale_attention,
    }


def export_published(model: Detector, path: str | Path) -> None:
    """Write the published layout: {"model": state_dict, "args": `published_arguments`}.

    A head that the decoder layers share is stored once per layer in it.
    """
    torch.save({"model": to_published(model), "args": published_arguments(model)}, path)


@dataclass(frozen=True)
class Published:
    """A file in the published layout. weights: under the names they came with.

    taken: the message that says which of several state dicts they are; None if there was one.
    """

    weights: dict[str, Tensor]
    arguments: dict[str, Any]
    taken: str | None


# Keys under which training programs keep a state dict; first the EMA of the weights, which is what they evaluate.
_AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict")
_WEIGHTS = ("model", "state_dict", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


def read_published(file: Path) -> Published:
    """The state dict of a file of torch.save, without the prefixes of wrappers, and its arguments.

    Raises ValueError when it holds none, holds anything but plain tensors and values, or asks for more memory than it
    has bytes.
    """
    if zipfile.is_zipfile(file) and _is_compressed(file):
        raise ValueError(f"{file}: its members are compressed, which torch never does; not a checkpoint")
    try:
        with file.open("rb") as raw:
            if not raw.read(4).startswith((b"PK\3\4", b"\x80")):  # torch makes a folder for a tar, before it refuses it
                raise ValueError("it is no file of torch.save")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the published files hold their arguments so
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise whatever they stumble over in a broken file
        if isinstance(error, OSError) and error.filename:
            raise
        reason = brief(str(error).partition("\n")[0] or type(error).__name__)
        raise ValueError(f"{file}: neither safetensors nor a checkpoint of plain tensors ({reason})") from error
    found = {key: weights for key in (*_AVERAGES, *_WEIGHTS) if (weights := _state_dict(content, key)) is not None}
    if not found and isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values()):
        found = {"": content}
    if not found:
        raise ValueError(
            f"{file}: expected the published layout, a dictionary with a state_dict under 'model', or a bare state_dict"
        )
    key, weights = next(iter(found.items()))
    _check_tensors(weights, file)
    arguments = content.get("args", {})  # a Namespace in the published files, a plain dictionary in ours
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"{file}: its 'args' are no arguments but {type(arguments).__name__}")
    others = [f"{other!r}" for other in found if other != key]
    taken = f"{file}: of its state dicts {key!r} is taken, not {', '.join(others)}" if others else None
    return Published(unwrapped(weights), arguments, taken)


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes of wrappers (`module.`, ...) that all names have."""
    names = list(weights)
    while prefix := next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, weights.values(), strict=True))


def _state_dict(content: Any, key: str) -> dict[str, Tensor] | None:
    """What is under a key, perhaps with its own wrapping; not scalars of an average, such as its decay."""
    inside = content.get(key) if isinstance(content, dict) else None
    for inner in ("module", "state_dict", "model"):
        if isinstance(inside, dict) and isinstance(inside.get(inner), dict):
            inside = inside[inner]
    return inside if isinstance(inside, dict) and inside else None


def _check_tensors(weights: Mapping[Any, Any], file: Path) -> None:
    size = file.stat().st_size
    for name, tensor in weights.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not (isinstance(name, str) and plain):
            raise ValueError(f"{file}: {visible(str(name))[:80]} in its 'model' is no plain tensor")
        if tensor.numel() * tensor.element_size() > min(tensor.untyped_storage().nbytes(), size):
            raise ValueError(f"{file}: {visible(name)} claims the shape {tuple(tensor.shape)}, but has fewer values")
    if sum(tensor.nbytes for tensor in from_published(unwrapped(weights)).values()) > size:
        raise ValueError(f"{file}: its tensors are larger than the file")


def _is_compressed(file: Path) -> bool:
    """Whether an archive has compressed members. Raises ValueError for one that two readers could read differently."""
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
            start, stated = archive.start_dir, _stated_start(raw)
            compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except Exception as error:  # as torch's
        raise ValueError(f"{file}: not a readable archive ({brief(str(error))})") from error
    if start != stated:
        raise ValueError(f"{file}: its table of contents is not where the archive says; not a checkpoint")
    return compressed


def _stated_start(raw: BinaryIO) -> int | None:
    """Where the last bytes of an archive say that its table of contents begins (APPNOTE.TXT, 4.3.14 to 4.3.16)."""
    raw.seek(-42, os.SEEK_END)
    locator, end = raw.read(20), raw.read(22)
    if not end.startswith(b"PK\5\6"):
        return None
    (start,) = struct.unpack_from("<L", end, 16)
    if not locator.startswith(b"PK\6\7"):
        return start
    raw.seek(struct.unpack_from("<Q", locator, 8)[0])
    (long_start,) = struct.unpack_from("<Q", raw.read(56).ljust(56, b"\0"), 48)
    return long_start if start in (long_start, 0xFFFFFFFF) else None


def from_published(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names; copies of heads and batch counters (num_batches_tracked) are dropped."""
    refined = any(name.startswith("transformer.decoder.bbox_embed.") for name in published)
    one_head = not refined and not _is_detr(published)
    weights = {}
    for name, tensor in published.items():
        if name.startswith("transformer.decoder.") and ("bbox_embed" in name or "class_embed" in name):
            continue
        if name.endswith("num_batches_tracked"):
            continue
        if one_head and re.match(r"(class_embed|bbox_embed)\.[1-9]", name):
            continue
        weights[_OURS.get(name) or re.sub(r"^backbone\.0\.body\.", "backbone.body.", name)] = tensor
    return weights


def published_config(published: Mapping[str, Tensor], arguments: Mapping[str, Any], file: Path) -> ModelConfig:
    """The model of a published checkpoint, from its tensors' shapes and, where it has them, its arguments.

    Without arguments, as in the released DETR weights, what no shape determines has the published default, with a
    warning: 8 heads, 300 proposals, softmax in DETR, and C5 at stride 32 unless the file's name says dc5.
    Raises ValueError for any other file.
    """
    if not arguments:
        arguments = {"dilation": "dc5" in file.name.lower()}
        dilation = "with dilation (DC5)" if arguments["dilation"] else "without dilation (else dc5 is in its name)"
        log.warning("%s holds no arguments: taken for a model of 8 heads, %s", file, dilation)

    def count(pattern: str) -> int:
        return len({match[1] for name in published if (match := re.match(pattern, name))})

    settings: dict[str, object] = {
        "backbone": "resnet50.tv_in1k" if "backbone.0.body.layer1.0.conv3.weight" in published else "resnet18.tv_in1k",
        "pretrained_backbone": False,
        "dilation": arguments.get("dilation", False),
        "heads": arguments.get("nheads", 8),
        "encoder_layers": count(r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": count(r"transformer\.decoder\.layers\.(\d+)\."),
    }
    try:
        settings |= _detr(published, arguments) if _is_detr(published) else _deformable(published, arguments)
        settings["feedforward_dim"] = published["transformer.encoder.layers.0.linear1.bias"].shape[0]
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        mistakes = "; ".join(f"{item['loc'][0] if item['loc'] else 'model'}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{file}: describes no model that can be built: {mistakes}") from error
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: its tensors or arguments fit no model ({error})") from error
    except KeyError as error:
        raise ValueError(
            f"{file}: neither a Deformable DETR nor a DETR checkpoint, it has no {error.args[0]}"
        ) from error


def published_categories(num_classes: int) -> Categories | None:
    """The categories of a published checkpoint, which brings no names: COCO's with 91 classes, otherwise None."""
    if num_classes != 91:
        return None
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    return Categories(tuple(range(91)), tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))


def is_published(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the published names, and not ours."""
    return any(name.startswith("backbone.0.body.") for name in weights)


def _is_detr(published: Mapping[str, Tensor]) -> bool:
    return "transformer.encoder.layers.0.self_attn.in_proj_weight" in published


def _detr(published: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, object]:
    queries, hidden_dim = published["query_embed.weight"].shape
    classification = arguments.get("classification", "softmax")
    return {
        "architecture": "detr",
        "levels": 1,
        "hidden_dim": hidden_dim,
        "queries": queries,
        "classification": classification,
        "num_classes": published["class_embed.bias"].shape[0] - (classification == "softmax"),
    }


def _deformable(published: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, object]:
    levels, hidden_dim = published["transformer.level_embed"].shape
    logits = published["transformer.decoder.layers.0.cross_attn.attention_weights.bias"].shape[0]
    two_stage = "transformer.pos_trans.weight" in published  # and then no query embedding tells their number
    queries = arguments.get("num_queries", 300) if two_stage else published["query_embed.weight"].shape[0]
    return {
        "levels": levels,
        "hidden_dim": hidden_dim,
        "points": logits // (arguments.get("nheads", 8) * levels),
        "box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in published,
        "two_stage": two_stage,
        "multi_scale_attention": arguments.get("multi_scale_attention", True),
        "num_classes": published["class_embed.0.bias"].shape[0],
        "queries": queries,
    }
