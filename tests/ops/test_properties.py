"""Both operators against the specification on random sizes, types, strides and places.

Shapes: N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

# The fixtures hold no state; derandomized, so that a run says something about the change and not about its luck.
checked = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# Usual numbers of channels, their neighbours, and what needs several passes of vectors.
CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 80, 128)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    side = st.integers(1, 9)
    shapes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=5))
    return {
        "shapes": shapes,
        "batch": draw(st.integers(0, 3)),
        "queries": draw(st.integers(0, 20)),
        "heads": draw(st.sampled_from((1, 2, 3, 8))),
        "channels": draw(st.sampled_from(CHANNELS)),
        "points": draw(st.integers(0, 9)),
    }


def _restrided(tensor: Tensor, seed: int) -> Tensor:
    """The same numbers with their dimensions in another order in memory, with gaps, and not at the start of it."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tensor.dim(), generator=generator).tolist()
    gaps = torch.randint(1, 3, (tensor.dim(),), generator=generator).tolist()
    sizes = [tensor.shape[dimension] * gap + 1 for dimension, gap in zip(order, gaps, strict=True)]
    view = tensor.new_full(sizes, torch.nan)[tuple(slice(1, None, gap) for gap in gaps)]
    view = view.permute([order.index(dimension) for dimension in range(tensor.dim())])
    view.copy_(tensor)
    return view


@checked
@given(sizes=sizes(), types=st.sampled_from(TYPES), strides=st.none() | st.integers(0, 99))
def test_plain_agrees(
    cpu_path: str,
    plain_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
    sizes: dict[str, Any],
    types: tuple[torch.dtype, torch.dtype],
    strides: int | None,
) -> None:
    arguments = plain_arguments(*types, **sizes)
    if strides is not None:
        arguments = [_restrided(argument, strides) for argument in arguments]
    assert_agrees(deform_attn, sizes["shapes"], arguments)


@checked
@given(
    sizes=sizes(),
    types=st.sampled_from(TYPES),
    coordinates=st.sampled_from((2, 4)),
    strides=st.none() | st.integers(0, 99),
)
def test_fused_agrees(
    cpu_path: str,
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
    sizes: dict[str, Any],
    types: tuple[torch.dtype, torch.dtype],
    coordinates: int,
    strides: int | None,
) -> None:
    arguments = fused_arguments(*types, coordinates=coordinates, **sizes)
    if strides is not None:
        arguments = [_restrided(argument, strides) for argument in arguments]
    assert_agrees(fused_deform_attn, sizes["shapes"], arguments)


ODD_PLACES = (0.0, 1.0, -0.0, 0.5, -1e-30, 1e-30, 1 - 1e-7, 7.5, -7.5, 1e9, -1e9, 2.0**31, 1e30, -3.4e38, 3.4e38)
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


@checked
@given(sizes=sizes(), places=st.lists(st.sampled_from(ODD_PLACES + NOT_FINITE), min_size=1, max_size=12))
def test_odd_places_agree(
    cpu_path: str,
    plain_arguments: Callable[..., list[Tensor]],
    sizes: dict[str, Any],
    places: list[float],
) -> None:
    """On borders, far outside and nowhere: the same output as the specification, NaN in the same places.

    Borders are places where the gradient of a location jumps, so that it is only checked to be NaN or finite together
    with its query's head.
    """
    value, locations, weights = plain_arguments(**sizes)
    flat = locations.view(-1)
    chosen = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(len(places)))[: len(places)]
    flat[chosen] = torch.tensor(places)[: len(chosen)]
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = deform_attn(leaves[0], sizes["shapes"], *leaves[1:])
    exact = reference.deform_attn(value.double(), sizes["shapes"], locations.double(), weights.double())
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=2e-4, equal_nan=True)

    output.sum().backward()
    sound = locations.isfinite().flatten(3).all(-1)  # (N, Q, H)
    for gradient in (leaves[1].grad, leaves[2].grad):
        assert gradient is not None
        assert gradient[sound].isfinite().all()
    healthy = sound.all(1)  # a (batch, head) without a poisoned query has a finite gradient of value
    assert leaves[0].grad is not None
    assert leaves[0].grad.transpose(1, 2)[healthy].isfinite().all()


@pytest.mark.parametrize("stride", ["batch", "queries", "levels"])
def test_expanded_arguments_agree(
    stride: str, fused_arguments: Callable[..., list[Tensor]], assert_agrees: Callable[..., None]
) -> None:
    """Strides of zero, as `expand` makes them of reference points that all levels share."""
    value, references, offsets, logits = fused_arguments()
    axis = {"batch": 0, "queries": 1, "levels": 2}[stride]
    expanded = references.narrow(axis, 0, 1).expand_as(references)
    assert 0 in expanded.stride()
    shapes = [(6, 7), (3, 4), (2, 1)]
    assert_agrees(fused_deform_attn, shapes, [value, expanded.clone(), offsets, logits])
    output = fused_deform_attn(value, shapes, expanded, offsets, logits)
    assert torch.equal(output, fused_deform_attn(value, shapes, expanded.clone(), offsets, logits))
