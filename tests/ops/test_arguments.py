"""Every mistake in the arguments gives one error that names the argument, what it was and what is expected."""

import re
from collections.abc import Callable

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn
from ddetr.ops.library import UNAVAILABLE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = [(6, 7), (3, 4), (2, 1)]  # 56 positions; the arguments have N = 2, Q = 11, H = 3, D = 16, P = 4


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ([], ValueError, "spatial_shapes must hold at least one (height, width), got none"),
        ([(6, 7, 1)], ValueError, "spatial_shapes must hold pairs (height, width), got (6, 7, 1)"),
        ([6, 7], ValueError, "spatial_shapes must hold pairs (height, width), got 6"),
        ([(6.0, 7)], TypeError, "spatial_shapes must hold pairs of int (height, width), got (6.0, 7)"),
        ([(6, 0)], ValueError, "spatial_shapes must hold positive (height, width), got (6, 0)"),
        (torch.ones(3), ValueError, "spatial_shapes must be an integer tensor of shape (L, 2), got torch.float32"),
        ([(6, 7)], ValueError, "positions for spatial_shapes [(6, 7)], got 56 in shape (2, 56, 3, 16)"),
    ],
)
def test_spatial_shapes(
    shapes: list, error: type[Exception], message: str, plain_arguments: Callable[..., list[Tensor]]
) -> None:
    value, locations, weights = plain_arguments()
    with pytest.raises(error, match=re.escape(message)):
        deform_attn(value, shapes, locations, weights)


def test_devices_without_the_op_are_named(
    plain_arguments: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    value, locations, weights = plain_arguments()
    monkeypatch.setitem(UNAVAILABLE, "cpu", "it was not built")
    with pytest.raises(OSError, match=r"ddetr.ops cannot run on cpu: it was not built"):
        deform_attn(value, SHAPES, locations, weights)
    with FakeTensorMode(allow_non_fake_inputs=True):
        value = torch.empty(value.shape, device="xpu")
        with pytest.raises(ValueError, match=r"value must be on a cpu or cuda device, got xpu"):
            deform_attn(value, SHAPES, locations, weights)


PLAIN = {
    "value that is no tensor": (0, lambda t: t.tolist(), TypeError, "value must be a tensor, got list"),
    "integer value": (0, lambda t: t.int(), TypeError, "value must be float64, float32, float16 or bfloat16, got"),
    "value without heads": (0, lambda t: t[..., 0], ValueError, "value must have shape (N, S, H, D), got (2, 56, 3)"),
    "flat locations": (
        *(1, lambda t: t.flatten(4), ValueError),
        "sampling_locations must have shape (N, Q, H, L, P, 2) = (2, Q, 3, 3, P, 2), got (2, 11, 3, 3, 8)",
    ),
    "locations of another batch": (1, lambda t: t[:1], ValueError, "sampling_locations must have shape"),
    "locations of another head count": (1, lambda t: t[:, :, :2], ValueError, "sampling_locations must have shape"),
    "locations of another level count": (1, lambda t: t[:, :, :, :2], ValueError, "sampling_locations must have shape"),
    "locations of three numbers": (1, lambda t: torch.cat([t, t], -1), ValueError, "sampling_locations must have"),
    "float64 locations": (1, lambda t: t.double(), TypeError, "sampling_locations must be float32, float16 or"),
    "flat weights": (
        *(2, lambda t: t.flatten(3), ValueError),
        "attention_weights must have shape (N, Q, H, L, P) = (2, 11, 3, 3, 4), got (2, 11, 3, 12)",
    ),
    "weights on another device": (2, lambda t: t.to("meta"), ValueError, "attention_weights must be on value's device"),
    "weights that are no tensor": (2, lambda t: None, TypeError, "attention_weights must be a tensor, got NoneType"),
}


@pytest.mark.parametrize(("index", "change", "error", "message"), PLAIN.values(), ids=PLAIN)
def test_plain_arguments(
    index: int,
    change: Callable,
    error: type[Exception],
    message: str,
    plain_arguments: Callable[..., list[Tensor]],
) -> None:
    arguments = plain_arguments()
    arguments[index] = change(arguments[index])
    with pytest.raises(error, match=re.escape(message)):
        deform_attn(arguments[0], SHAPES, *arguments[1:])


FUSED = {
    "references of three numbers": (
        *(1, lambda t: t[..., :3], ValueError),
        "reference_points must have shape (N, Q, L, 2 or 4) = (2, 11, 3, 2 or 4), got (2, 11, 3, 3)",
    ),
    "references of one level": (1, lambda t: t[:, :, :1], ValueError, "reference_points must have shape"),
    "references of other queries": (1, lambda t: t[:, :5], ValueError, "reference_points must have shape"),
    "integer references": (1, lambda t: t.int(), TypeError, "reference_points must be float32, float16 or bfloat16"),
    "flat offsets": (2, lambda t: t.flatten(3), ValueError, "sampling_offsets must have shape (N, Q, H, L, P, 2) ="),
    "logits by level": (
        *(3, lambda t: t.unflatten(-1, (3, 4)), ValueError),
        "attention_logits must have shape (N, Q, H, L*P) = (2, 11, 3, 12), got (2, 11, 3, 3, 4)",
    ),
    "too few logits": (3, lambda t: t[..., :11], ValueError, "attention_logits must have shape"),
}


@pytest.mark.parametrize(("index", "change", "error", "message"), FUSED.values(), ids=FUSED)
def test_fused_arguments(
    index: int,
    change: Callable,
    error: type[Exception],
    message: str,
    fused_arguments: Callable[..., list[Tensor]],
) -> None:
    arguments = fused_arguments()
    arguments[index] = change(arguments[index])
    with pytest.raises(error, match=re.escape(message)):
        fused_deform_attn(arguments[0], SHAPES, *arguments[1:])


def test_float64_stays_together(plain_arguments: Callable[..., list[Tensor]]) -> None:
    value, locations, weights = plain_arguments(torch.float64)
    with pytest.raises(TypeError, match="attention_weights must be float64 beside a float64 value"):
        deform_attn(value, SHAPES, locations, weights.float())


@pytest.mark.parametrize(
    ("operator", "index", "change"),
    [
        ("deform_attn", 0, lambda t: t[:, :5]),
        ("deform_attn", 2, lambda t: t[:1]),
        ("deform_attn", 3, lambda t: t[:, :5]),
        ("deform_attn", 3, lambda t: t.half()),
    ],
)
def test_the_compiled_operators_never_trust_a_direct_call(
    operator: str, index: int, change: Callable, plain_arguments: Callable[..., list[Tensor]]
) -> None:
    value, locations, weights = plain_arguments()
    arguments = [value, [6, 7, 3, 4, 2, 1], locations, weights]
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match="must"):
        getattr(torch.ops.ddetr, operator)(*arguments)
