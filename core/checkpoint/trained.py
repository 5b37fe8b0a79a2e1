"""Load weights from disk: into the detector that a checkpoint describes, or into one that is there already."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...data.categories import Categories
from ...data.documents import parse_json
from ...data.text import visible
from ..config import Config
from ..model.detector import Detector, build
from ..model.finite import check_finite
from ..ownership import check_own
from .description import contents_of, described_by
from .fit import check_fit
from .labels import check_shared, continued_heads, label_map
from .published import from_published, is_published, published_categories, read_published, unwrapped
from .weights import StoredTensors, read_newest, shapes_of

log = logging.getLogger("ddetr")


@dataclass(frozen=True)
class TrainedDetector:
    """A detector ready for inference and what is known about it."""

    model: Detector  # in eval mode
    config: Config
    categories: Categories | None  # None: published weights, whose label is the COCO category id itself
    step: int | None
    epochs: int | None  # that were done
    path: Path


def load_detector(
    path: str | Path,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    config: Config | None = None,
) -> TrainedDetector:
    """Build the model that the checkpoint describes, with its weights, on `device`, ready for inference.

    overrides: of its configuration, section.key=value. config: replaces that configuration; for a run that loads its
    own checkpoint. Raises what `contents` raises. Raises ForeignSettingError for privileged settings of the checkpoint
    that are not the user's own (core/ownership.py), such as a backbone to be fetched from elsewhere. Raises ValueError,
    before the model takes any memory, when the configuration describes another model than the tensors are, and for a
    value that is not finite.
    """
    return read_newest(path, lambda file: _loaded(file, device, overrides, config))


def _loaded(file: Path, device: str | torch.device, overrides: Sequence[str], config: Config | None) -> TrainedDetector:
    found = contents_of(file, overrides)
    if config is None:
        config = found.config
        check_own(config, ("model.backbone", "data.most_pixels"), overrides, found.file)
    without_download = config.model.model_copy(update={"pretrained_backbone": False})
    try:
        with torch.device("meta"):
            shape = build(without_download)
    except ValueError as error:  # a backbone that timm does not know, or not so
        raise ValueError(f"{file}: its model cannot be built: {error}") from error
    foreign = check_fit(shape, found.shapes, found.file)
    model = build(without_download)
    weights = {name: found.weights[name] for name in found.shapes if name not in foreign}
    check_finite(weights, found.file)
    model.load_state_dict(weights)
    model.to(device).eval().requires_grad_(False)
    return TrainedDetector(model, config, found.categories, found.step, found.epochs, found.file)


def load_weights(
    model: Detector,
    path: str | Path,
    *,
    new_class_head: bool = False,
    categories: Categories | None = None,
    tell: Callable[[str], None] = log.warning,
) -> list[str]:
    """Load the weights of a run or checkpoint directory, a safetensors file or a published checkpoint into `model`.

    categories: of the model's labels, for fine-tuning. Where those of the file are known, rows of its class heads go to
    the labels of the same name. With `new_class_head` the class heads stay as they are in `model`, and the names of
    their tensors are returned. `tell` gets a line each on: which of several state dicts was taken, foreign tensors left
    out, classes kept, moved and started from scratch.

    Raises FileNotFoundError when there is no such file. Raises ValueError that lists missing, unexpected and re-shaped
    tensors of another architecture, that names the first tensor with a value that is not finite, or when no class is
    shared. The model is unchanged then. For a model on the meta device these checks are all.
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
        weights |= continued_heads(weights, ours, model.config, labels, file)
    foreign = check_fit(model, shapes_of(weights), file)
    if foreign:
        shown = ", ".join(map(visible, foreign[:8])) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        tell(f"{file}: left out, no part of this detector: {shown}")
    if not any(tensor.is_meta for tensor in ours.values()):
        model.load_state_dict({name: weights[name] for name in ours})
    return heads if new_class_head else []


def _stored_weights(file: Path, tell: Callable[[str], None]) -> tuple[dict[str, Tensor], Categories | None]:
    """The tensors of a file under our names, and what the labels of their class heads mean, if that is known."""
    if file.suffix == ".safetensors":
        stored = StoredTensors(file)
        weights, described = unwrapped(stored), stored.metadata.get("categories")
        if described is not None:
            return weights, described_by(file, lambda: Categories.from_json(parse_json(described)))
        weights = from_published(weights) if is_published(weights) else weights
    else:
        published = read_published(file)
        if published.taken:
            tell(published.taken)
        weights = from_published(published.weights)
    classes = [len(tensor) for name, tensor in weights.items() if re.fullmatch(r"class_embed\.(0\.)?bias", name)]
    return weights, published_categories(classes[0]) if classes else None
