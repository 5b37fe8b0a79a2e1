"""The feature maps of a timm model, examined on the meta device: tensors have a shape and a graph but no values.

Shapes: N images of H x W pixels, s the stride of a feature map.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import Format
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.func import functional_call

C3_STRIDE = 8
# Height and width of trial images: of a single pixel's height, then just above and below multiples of the strides.
SIZES = ((1, 33), (47, 95), (65, 129))


@dataclass(frozen=True)
class FeatureMaps:
    """What a timm model needs for its feature maps.

    piece: the height and width of an image must be multiples of it; maps are then (H / s, W / s), rounded up. used:
    names of the parameters that the wanted maps depend on. before_c3: names of the parameters of the stem and the first
    stage: those that the last map finer than C3 depends on, without the modules that first run at C3's stride.
    """

    piece: int
    used: frozenset[str]
    before_c3: frozenset[str]


_examined: dict[tuple[str, ...], FeatureMaps] = {}  # by what says all of a model but the values of its weights


def feature_maps(body: nn.Module, indices: Sequence[int], name: str) -> FeatureMaps:
    """Examine the feature maps `indices` of the timm model `name` with `features_only`, once in a process.

    Raises ValueError, which says why, when images of some size give no maps of their stride, however they are padded.
    """
    key = name, str(indices), str(body)
    if key not in _examined:
        _examined[key] = _examine(body, indices)
    return _examined[key]


def _examine(body: nn.Module, indices: Sequence[int]) -> FeatureMaps:
    info = cast(FeatureInfo, body.feature_info)
    reductions = info.reduction()
    side = max(getattr(body, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:])
    mistake = ""
    for piece in (1, reductions[-1], side):
        # The last one is of several pieces, and large enough for strides to be told apart.
        sizes = *SIZES, (max(256, 2 * piece), max(384, 3 * piece))
        try:
            for height, width in sizes:
                trial = _Trial(body, -(-height // piece) * piece, -(-width // piece) * piece)
                trial.check(reductions, info.channels(), indices)
        except Exception as error:  # whatever a model raises about sizes that it does not take
            mistake = f"{error}".partition("\n")[0] or type(error).__name__
            continue
        finer = [index for index, reduction in enumerate(reductions) if reduction < C3_STRIDE]
        used = frozenset[str]().union(*(trial.origins(index) for index in indices))
        before_c3 = trial.origins(finer[-1]) - trial.later if finer else set[str]()
        return FeatureMaps(piece, used, frozenset(before_c3))
    raise ValueError(mistake)


class _Trial:
    """A forward pass in training mode; `later`: parameters of modules first called when C3's stride was reached."""

    def __init__(self, body: nn.Module, height: int, width: int) -> None:
        self._size = height, width
        parameters = {n: torch.empty_like(p, device="meta").requires_grad_() for n, p in body.named_parameters()}
        buffers = {name: buffer.to("meta") for name, buffer in body.named_buffers()}
        versions = {name: buffer._version for name, buffer in buffers.items()}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        c3_size = height // C3_STRIDE, width // C3_STRIDE
        begun: dict[str, None] = {}
        earlier: set[str] = set()

        def begin(name: str) -> None:
            begun.setdefault(name)

        def end(name: str, output: Any) -> None:
            reached = isinstance(output, Tensor) and c3_size in (output.shape[1:3], output.shape[2:4])
            if reached and not earlier:
                earlier.update(list(begun)[: list(begun).index(name)])

        hooks = []
        for name, module in body.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
            hooks.append(module.register_forward_hook(lambda *args, name=name: end(name, args[-1])))
        training = body.training
        try:
            images = torch.empty(2, 3, height, width, device="meta")
            with torch.enable_grad():
                features = functional_call(body.train(), parameters | buffers, (images,))
        finally:
            body.train(training)
            for hook in hooks:
                hook.remove()
        channels_last = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC  # as Swin returns them
        self._features = [feature.permute(0, 3, 1, 2) if channels_last else feature for feature in features]
        self._changed = [name for name, buffer in buffers.items() if buffer._version != versions[name]]
        modules = set(begun) - earlier if earlier else set()
        self.later = {name for name in parameters if name.rpartition(".")[0] in modules}

    def check(self, reductions: Sequence[int], channels: Sequence[int], indices: Collection[int]) -> None:
        if self._changed:
            raise ValueError(f"{self._changed[0]} follows the batches, in a norm that is no BatchNorm2d")
        if len(self._features) != len(reductions):
            raise ValueError(f"it returns {len(self._features)} feature maps and names {len(reductions)}")
        for index in indices:
            expected = (2, channels[index], *(-(-side // reductions[index]) for side in self._size))
            if self._features[index].shape != expected:
                raise ValueError(
                    f"of images of {self._size[0]} x {self._size[1]} pixels its map of stride {reductions[index]} is "
                    f"{tuple(self._features[index].shape)} and not {expected}"
                )

    def origins(self, index: int) -> set[str]:
        """The parameters that the feature map is computed from."""
        seen, found, nodes = set(), set(), [self._features[index].grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (variable := getattr(node, "variable", None)) is not None:  # a leaf of the graph
                found.add(self._names[id(variable)])
            nodes += [parent for parent, _ in node.next_functions]
        return found
