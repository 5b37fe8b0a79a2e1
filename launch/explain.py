"""`ddetr explain`: where one object query looked. Sampling points and attention weights drawn, as in the paper (A.5).

Shapes: Q queries, H heads, L levels, P points.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.checkpoint import TrainedDetector, load_detector
from ..core.model.attention import MultiScaleDeformableAttention
from ..core.model.detector import DeformableDetr
from ..core.training.world import device_for
from ..data.batch import collate, normalised
from ..data.boxes import cxcywh_to_xyxy
from ..data.images import load_upright, read_file
from ..data.transforms import evaluation_sample
from .console import brief, say
from .predict import category_names

TITLE_LENGTH = 24  # characters of a category's name above a panel


@dataclass(frozen=True)
class SamplingPoints:
    """Where one query of one attention module samples, relative to the image, and how much each sample counts."""

    locations: Tensor  # (H, L, P, 2) as (x, y); the image is [0, 1], a point outside samples zeros
    weights: Tensor  # (H, L, P), for each head they sum to 1
    reference: Tensor  # (2,) as (x, y)


@dataclass(frozen=True)
class Explanation:
    """One object query of the last decoder layer, and one position of the last encoder layer."""

    query: int
    label: int
    score: float
    box_xyxy: Tensor  # (4,) relative to the image
    decoder: SamplingPoints
    encoder: SamplingPoints  # of the finest level's pixel at the box's centre


def explain(
    checkpoint: Path, image: Path, output: Path, query: int | None = None, overrides: Sequence[str] = ()
) -> Explanation:
    """Draw the sampling points of `query` (default: the one with the best score) of an image into the file `output`.

    Raises ValueError for an image that cannot be read, a query that does not exist and an unknown picture format, and
    FloatingPointError for a query whose numbers are not finite.
    """
    data = read_file(image)
    detector = load_detector(checkpoint, overrides=overrides)
    try:
        pixels = load_upright(data, most_pixels=detector.config.data.most_pixels)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    explanation = explained(detector, pixels, query)
    name = brief(category_names(detector)[explanation.label])
    draw_explanation(pixels, explanation, name, output)
    say(f"query {explanation.query}: {name} {explanation.score:.2f}, drawn in {output}")
    return explanation


@torch.inference_mode()
def explained(detector: TrainedDetector, pixels: np.ndarray, query: int | None = None) -> Explanation:
    """The sampling points behind one query's detection in an RGB image (height, width, 3) uint8."""
    if not isinstance(detector.model, DeformableDetr) or not detector.config.model.multi_scale_attention:
        raise ValueError(f"{detector.path}: only multi-scale deformable attention has sampling points to draw")
    device = device_for(detector.config.train, local_rank=0)
    model = detector.model.to(device)
    batch = collate([evaluation_sample(pixels, detector.config.data)]).batch().to(device)
    decoder_attention = _attention(model.transformer.decoder.layers[-1].cross_attn)
    encoder_attention = _attention(model.transformer.encoder.layers[-1].self_attn)
    with recorded(decoder_attention) as decoder, recorded(encoder_attention) as encoder:
        predictions = model(normalised(batch.images, batch.padding_mask), batch.padding_mask)
    scores = predictions.logits[0].sigmoid()  # (Q, K)
    if query is None:
        query = int(scores.nan_to_num(nan=-1.0).amax(-1).argmax())
    if not 0 <= query < len(scores):
        raise ValueError(f"query {query}: this detector has queries 0 to {len(scores) - 1}")
    if not (predictions.logits[0, query].isfinite().all() and predictions.boxes[0, query].isfinite().all()):
        raise FloatingPointError(f"query {query}: {detector.path} gives infinities or NaN for this image")
    label = int(scores[query].argmax())
    box_xyxy = cxcywh_to_xyxy(predictions.boxes[0, query]).cpu()
    height, width = encoder.spatial_shapes[0]
    centre = predictions.boxes[0, query, :2].clamp(0, 1 - 1e-6).tolist()
    position = int(centre[1] * height) * width + int(centre[0] * width)  # the finest level's tokens come first
    return Explanation(
        query, label, float(scores[query, label]), box_xyxy, decoder.points(query), encoder.points(position)
    )


def _attention(module: Any) -> MultiScaleDeformableAttention:
    assert isinstance(module, MultiScaleDeformableAttention)
    return module


class Recording:
    """What an attention module computed in its last forward pass. The image has no padding, so levels are whole."""

    def __init__(self, module: MultiScaleDeformableAttention) -> None:
        self._grid = (module.heads, module.levels, module.points)
        self.spatial_shapes: list[tuple[int, int]] = []
        self.reference_points = torch.empty(0)  # (1, Q, L, 2 or 4)
        self.offsets = torch.empty(0)  # (1, Q, H * L * P * 2)
        self.logits = torch.empty(0)  # (1, Q, H * L * P)

    def points(self, query: int) -> SamplingPoints:
        """The location arithmetic of `ddetr.ops.fused_deform_attn` for one query."""
        heads, levels, points = self._grid
        reference = self.reference_points[0, query].float()  # (L, 2 or 4)
        offsets = self.offsets[0, query].float().view(heads, levels, points, 2)
        if reference.shape[-1] == 4:
            locations = reference[:, None, :2] + offsets / points * reference[:, None, 2:] * 0.5
        else:
            sizes = torch.tensor([(w, h) for h, w in self.spatial_shapes], device=offsets.device)
            locations = reference[:, None] + offsets / sizes[:, None]
        weights = self.logits[0, query].float().view(heads, levels * points).softmax(-1).view(heads, levels, points)
        return SamplingPoints(locations.cpu(), weights.cpu(), reference[0, :2].cpu())


@contextlib.contextmanager
def recorded(module: MultiScaleDeformableAttention) -> Iterator[Recording]:
    """Record the forward passes of an attention module by hooks, which are gone afterwards."""
    recording = Recording(module)

    def keep_inputs(_: Any, arguments: tuple[Any, ...]) -> None:
        recording.reference_points, recording.spatial_shapes = arguments[1], list(arguments[3])

    def keep_offsets(_: Any, __: Any, result: Tensor) -> None:
        recording.offsets = result

    def keep_logits(_: Any, __: Any, result: Tensor) -> None:
        recording.logits = result

    handles = [
        module.register_forward_pre_hook(keep_inputs),
        module.sampling_offsets.register_forward_hook(keep_offsets),
        module.attention_weights.register_forward_hook(keep_logits),
    ]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def draw_explanation(pixels: np.ndarray, explanation: Explanation, name: str, output: Path) -> None:
    """Two rows, decoder and encoder: all sampling points on the image, then those of each level, closer."""
    from matplotlib import rc_context

    # A category may be called `$x$`: nothing drawn is mathematics, and least of all a program for TeX.
    with rc_context({"text.parse_math": False, "text.usetex": False}):
        _draw_explanation(pixels, explanation, brief(name, TITLE_LENGTH), output)


def _draw_explanation(pixels: np.ndarray, explanation: Explanation, name: str, output: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    size = np.array([width, height])
    levels = explanation.decoder.weights.shape[1]
    panel = 3.4
    figsize = (panel * (levels + 1) + 0.8, 2 * (panel * min(height / width, 1.6) + 0.4))
    figure = Figure(figsize=figsize, dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if output.suffix.lower().removeprefix(".") not in canvas.get_supported_filetypes():
        raise ValueError(f"{output}: unknown picture format; end the name in .png, .jpg, .pdf or .svg")
    x0, y0, x1, y1 = (explanation.box_xyxy.numpy() * np.tile(size, 2)).tolist()
    rows = (
        (explanation.decoder, f"decoder, query {explanation.query}:\n{name} {explanation.score:.2f}"),
        (explanation.encoder, "encoder, at the box's centre"),
    )
    for axes, (points, title) in zip(figure.subplots(2, levels + 1, squeeze=False), rows, strict=True):
        locations, weights = points.locations.numpy() * size, points.weights.numpy()
        colours = Normalize(0, weights.max())
        left, top, right, bottom = _close_view(locations, (x0, y0, x1, y1), size)
        for column, axis in enumerate(axes):
            chosen = slice(None) if column == 0 else slice(column - 1, column)
            x, y = locations[:, chosen].reshape(-1, 2).T
            shown = weights[:, chosen].reshape(-1)
            order = shown.argsort()  # the heaviest on top
            axis.imshow(pixels, extent=(0, width, height, 0), alpha=0.8)
            axis.scatter(
                x[order], y[order], c=shown[order], cmap="plasma", norm=colours, s=14 if column == 0 else 34,
                edgecolors="white", linewidths=0.5,
            )  # fmt: skip
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="#00e676", linewidth=2))
            axis.plot(*(points.reference.numpy() * size), "+", color="#00e676", markersize=11, markeredgewidth=2)
            if column == 0:
                axis.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linestyle="--")
                )
                axis.set(xlim=(-0.04 * width, 1.04 * width), ylim=(1.04 * height, -0.04 * height), title=title)
            else:
                share = shown.sum() / len(weights)
                axis.set(xlim=(left, right), ylim=(bottom, top), title=f"level {column}: {share:.0%} of the weight")
            axis.set_axis_off()
        figure.colorbar(ScalarMappable(colours, "plasma"), ax=list(axes), label="attention weight", fraction=0.02)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(output)


def _close_view(
    locations: np.ndarray, box_xyxy: tuple[float, float, float, float], size: np.ndarray
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a part of the image, in its proportions, around box and most sampling points."""
    corners = np.concatenate([locations.reshape(-1, 2), np.reshape(box_xyxy, (2, 2))]).clip(0, size)
    low, high = np.quantile(corners, 0.02, axis=0), np.quantile(corners, 0.98, axis=0)
    half = 0.56 * max(0.15, ((high - low) / size).max()) * size
    centre = (low + high) / 2
    return (*(centre - half), *(centre + half))
