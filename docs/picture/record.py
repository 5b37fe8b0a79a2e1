"""One real forward pass of preset r50_two_stage and its losses, with what every part was given and gave."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from ddetr.core.config import Config, load
from ddetr.core.model import criterion as criterion_module
from ddetr.core.model import detector, matcher, transformer
from ddetr.core.model.attention import MultiScaleDeformableAttention
from ddetr.core.model.criterion import Losses, criterion
from ddetr.core.model.detector import DeformableDetr
from ddetr.core.model.heads import MLP
from ddetr.core.model.matcher import Matches
from ddetr.core.model.outputs import Predictions
from ddetr.data.batch import Batch, normalised
from ddetr.ops import reference
from torch import Tensor, nn

from . import scene

PRESET = "r50_two_stage"
SEED = 14  # proposals of all levels, some near the objects
# A fresh model's sampling offsets, attention weights and boxes do not depend on what it sees (appendix A.4: their
# weights are zero). With a little noise instead, the picture has something to show.
NOISE = {"sampling_offsets": 0.02, "attention_weights": 0.03, "output_layer": 0.03}


@dataclass(frozen=True)
class Call:
    arguments: tuple[Any, ...]
    result: Any


@dataclass(frozen=True)
class Record:
    config: Config
    model: DeformableDetr
    batch: Batch
    images: Tensor  # normalised
    predictions: Predictions
    losses: Losses
    modules: dict[str, Call]  # by name in the model; of one called several times, the last
    functions: dict[str, list[Call]]  # by name

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's output."""
        return tuple(self.modules[module].result.shape)

    def call(self, function: str) -> Call:
        """The only call, or the last one."""
        return self.functions[function][-1]

    def attention(self, module: MultiScaleDeformableAttention) -> "Sampling":
        name = next(name for name, other in self.model.named_modules() if other is module)
        call = self.functions[f"{name}.attend"][-1]
        value, shapes, points, offsets, logits = call.arguments
        return Sampling(value, list(shapes), points, offsets, logits, call.result)

    @property
    def matches(self) -> list[Matches]:
        return self.call("solve").result


@dataclass(frozen=True)
class Sampling:
    """One call of `fused_deform_attn`."""

    value: Tensor
    shapes: list[tuple[int, int]]
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    attended: Tensor

    def points(self, image: int, query: int) -> tuple[Tensor, Tensor]:
        """Locations (H, L, P, 2) as (x, y) of the padded map, and weights (H, L, P), of one query."""
        around, offsets = self.reference[image, query], self.offsets[image, query]
        heads, levels, points, _ = offsets.shape
        if around.shape[-1] == 4:
            locations = around[:, None, :2] + offsets / points * around[:, None, 2:] * 0.5
        else:
            locations = around[:, None] + offsets / torch.tensor(self.shapes).flip(1)[:, None]
        weights = self.logits[image, query].softmax(-1).view(heads, levels, points)
        read = reference.deform_attn(self.value[image, None], self.shapes, locations[None, None], weights[None, None])
        torch.testing.assert_close(read[0, 0], self.attended[image, query], atol=1e-4, rtol=1e-4)  # what the op read
        return locations, weights


@torch.no_grad()
def record() -> Record:
    config = load(PRESET, ["model.pretrained_backbone=false"])
    batch = scene.batch()
    torch.manual_seed(SEED)
    model = detector.build(config.model).eval()
    assert isinstance(model, DeformableDetr)
    _disturb(model)
    functions: dict[str, list[Call]] = defaultdict(list)
    modules: dict[str, Call] = {}
    with contextlib.ExitStack() as stack:
        for owner, names in (
            (DeformableDetr, ("_tokens", "_propose")),
            (detector, ("sine_position", "proposal_position", "decoder_reference_points", "_anchors")),
            (transformer, ("encoder_reference_points",)),
            (matcher, ("_cost", "HostCopy")),
            (matcher.Matching, ("solve",)),
            (criterion_module, ("_focal",)),
        ):
            for name in names:
                stack.enter_context(_watched(owner, name, functions[name]))
        for name, module in model.named_modules():
            if isinstance(module, MultiScaleDeformableAttention):
                stack.enter_context(_watched(module, "attend", functions[f"{name}.attend"]))
            stack.enter_context(_hooked(module, name, modules))
        images = normalised(batch.images, batch.padding_mask)
        predictions = model(images, batch.padding_mask)
        losses = criterion(predictions, batch, config.optim, len(batch.labels))
    return Record(config, model, batch, images, predictions, losses, modules, dict(functions))


def _disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)

    def noise(layer: nn.Linear, std: float) -> None:
        layer.weight.add_(torch.randn(layer.weight.shape, generator=generator), alpha=std)

    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            noise(module.sampling_offsets, NOISE["sampling_offsets"])
            noise(module.attention_weights, NOISE["attention_weights"])
        elif isinstance(module, MLP):
            noise(module.output_layer, NOISE["output_layer"])


@contextlib.contextmanager
def _watched(owner: Any, name: str, calls: list[Call]) -> Iterator[None]:
    """`owner.name` leaves its calls in the list. AttributeError when there is nothing of that name."""
    original: Callable[..., Any] = getattr(owner, name)

    @wraps(original)
    def watching(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        calls.append(Call(arguments, result))
        return result

    with mock.patch.object(owner, name, watching):
        yield


@contextlib.contextmanager
def _hooked(module: nn.Module, name: str, calls: dict[str, Call]) -> Iterator[None]:
    def keep(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        calls[name] = Call(arguments, result)

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
