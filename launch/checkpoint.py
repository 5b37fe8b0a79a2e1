"""`ddetr checkpoint`: what a checkpoint holds, and its weights in other formats."""

import copy
import itertools
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from torch import Tensor, nn

from ..core.checkpoint import (
    Contents,
    TrainedDetector,
    contents,
    export_published,
    load_detector,
    read_newest,
    save_weights,
)
from ..core.checkpoint.codec import Checkpoint
from ..core.checkpoint.manifest import verify
from ..core.config import dump
from ..core.evaluation import result
from ..core.evaluation.result import Result
from ..core.evaluation.scores import in_brief
from ..core.model.attention import MultiScaleDeformableAttention
from ..core.model.cost import OTHERS, PARTS, part_of
from ..core.model.detector import Detector
from ..data.batch import normalised
from ..data.categories import Categories
from ..data.files import unfinished
from ..data.text import visible
from ..ops import reference
from .console import Terminal, brief, say
from .predict import category_names

SUFFIXES = {"safetensors": ".safetensors", "published": ".pth", "onnx": ".onnx"}


def inspect(path: Path) -> None:
    """Print step, sizes by part of the model, categories, its scores and the configuration.

    Nothing in the file is executed, built or acted on. Raises what `contents` raises.
    """
    found, facts = read_newest(path, _facts)
    console = Terminal(soft_wrap=True)
    for name, value in facts.items():
        console.print(Text.assemble((f"{name:>10}", "bold"), f"  {visible(value)}"))
    table = Table("part", "tensors", "values", "float32")
    for column in table.columns[1:]:
        column.justify = "right"
    parts: dict[str, list[int]] = {part: [] for part in (*PARTS, OTHERS)}
    for name, shape in found.shapes.items():
        parts[part_of(name, found.config.model)].append(math.prod(shape))
    for title, held in (*parts.items(), ("total", list(itertools.chain(*parts.values())))):
        if not held:
            continue
        values = sum(held)
        table.add_row(title, str(len(held)), f"{values:,}", _bytes(4 * values))
    console.print(table)
    console.print(Text("configuration", "bold"))
    console.print(Text(dump(found.config, for_others=True)))  # YAML writes what is not printable as an escape


def _facts(file: Path) -> tuple[Contents, dict[str, str]]:
    found = contents(file)
    facts = {
        "position": "published weights" if found.step is None else f"step {found.step}, {found.epochs} epoch(s) done",
        "stored as": _stored_types(file),
        "categories": _categories(found),
        "evaluated": _evaluated(file) or "not yet (ddetr eval)",
        "resumable": _resumable(file.parent),
    }
    return found, {"file": f"{file} ({_bytes(file.stat().st_size)})", **facts}  # last: it was there for all of them


def export(
    path: Path,
    output: Path,
    format: str,
    image_size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Write the weights of the checkpoint at `path` to the file `output`.

    format: safetensors (ours: one file with configuration and categories), published (the layout of the paper's
    code) or onnx, for images of exactly `image_size` (height, width), by default a square of
    data.validation_short_side. Raises ValueError for an unfit file name, ImportError without the extra of ONNX.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format {format!r}: expected one of {', '.join(SUFFIXES)}")
    detector = load_detector(path, overrides=overrides)
    if output.suffix != SUFFIXES[format]:
        raise ValueError(f"{output}: the name of a {format} file must end in {SUFFIXES[format]}")
    if output.exists() and output.resolve() == detector.path.resolve():
        raise ValueError(f"{output} is the checkpoint itself; choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[TrainedDetector, Path], str]] = {
        "safetensors": _write_safetensors,
        "published": _write_published,
        "onnx": lambda detector, file: _write_onnx(detector, file, image_size),
    }
    with unfinished(output) as file:
        note = writers[format](detector, file)
    say(f"{output}: {_bytes(output.stat().st_size)}{note}")


class FixedSizeDetector(nn.Module):
    """The detector for one image of one size, in plain torch: what the ONNX file computes.

    The op's reference takes the place of the kernel, which ONNX does not know.
    """

    def __init__(self, model: Detector, height: int, width: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.attend = reference.fused_deform_attn
        self.size = (height, width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (1, 3, H, W) uint8 RGB; returns logits (1, Q, K) and boxes (1, Q, 4) cxcywh in [0, 1]."""
        padding_mask = torch.zeros(1, *self.size, dtype=torch.bool)
        predictions = self.model(normalised(images, padding_mask), padding_mask)
        return predictions.logits, predictions.boxes


def _write_safetensors(detector: TrainedDetector, file: Path) -> str:
    names = category_names(detector)
    categories = detector.categories or Categories(tuple(range(len(names))), names)
    save_weights(
        file, detector.model.state_dict(), detector.config, categories, detector.step or 0, detector.epochs or 0
    )
    return ""


def _write_published(detector: TrainedDetector, file: Path) -> str:
    export_published(detector.model, file)
    config = detector.config.model
    if config.backbone_norm != "frozen_batch" or not config.backbone.startswith("resnet50."):
        return (
            f"; the names are the published ones, but the paper's code cannot build {config.backbone!r} as it is here"
        )
    return "; read it with torch.load(..., weights_only=True)['model']"


def _write_onnx(detector: TrainedDetector, file: Path, image_size: tuple[int, int] | None) -> str:
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it and would fail late)
    except ImportError as error:
        raise ImportError(f"ONNX export needs the extra: pip install 'ddetr[export]' ({error})") from error
    height, width = image_size or (detector.config.data.validation_short_side,) * 2
    images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            FixedSizeDetector(detector.model, height, width).eval(),
            (images,),
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits", "boxes"],
            verbose=False,
        )
    assert program is not None, "dynamo=True returns a program"
    model = program.model_proto
    names = category_names(detector)
    ids = detector.categories.ids if detector.categories else tuple(range(len(names)))
    onnx.helper.set_model_props(
        model,
        {
            "images": f"uint8 RGB, (1, 3, {height}, {width}), the whole image resized to this size",
            "boxes": "cxcywh relative to the image",
            "logits": "one per query and class; sigmoid gives the score"
            if detector.config.model.classification == "sigmoid"
            else 'one per query and class, "no object" the last; softmax gives the score',
            "categories": json.dumps(Categories(ids, names).to_json()),
        },
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
    return f", for uint8 images of exactly {height}x{width} pixels; outputs logits and boxes (cxcywh in [0, 1])"


def _stored_types(file: Path) -> str:
    if file.suffix != ".safetensors":
        return "a published checkpoint, read as float32"
    with safe_open(file, framework="pt") as opened:
        types = Counter(opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118
    return "safetensors, " + ", ".join(f"{count} tensors {name}" for name, count in types.items())


def _categories(found: Contents) -> str:
    if found.categories is None:
        return f"{found.config.model.num_classes}, labels are category ids"
    pairs = zip(found.categories.ids, found.categories.names, strict=True)
    return f"{len(found.categories)}: " + ", ".join(f"{brief(name)} ({id_})" for id_, name in pairs)


def _evaluated(file: Path) -> str | None:
    """The scores of this checkpoint, of each set and settings that it was evaluated on and with."""
    try:
        return "; ".join(map(_scores, result.known(file))) or None
    except ValueError as error:
        return str(error)


def _scores(found: Result) -> str:
    images = f" on {found.images} images" if found.images else ""
    if math.isnan(found.metrics[found.headline]):
        return f"no score{images}: the model gave infinities or NaN"
    departure = f", {found.departure}" if found.departure else ""
    return in_brief(found.metrics, found.headline, found.protocol) + images + departure


def _resumable(folder: Path) -> str:
    """Whether training can go on from it, or why not."""
    try:
        values, stored = verify(folder), Checkpoint.read(folder)
    except ValueError as error:
        return f"no: {error}"
    total = sum(file["bytes"] for file in values["files"].values())
    by = f"{stored.ranks} rank(s), ZeRO {stored.zero_stage}"
    return f"{_bytes(total)} in all, checksums right; written by {by}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
