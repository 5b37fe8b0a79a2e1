"""The two operators: argument checks, shape inference for tracing, and gradients over the compiled kernels.

Shapes: N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import UNAVAILABLE

_HALF_TYPES = (torch.float16, torch.bfloat16)
_VALUE_TYPES = (torch.float64, torch.float32, *_HALF_TYPES)


def deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3, without its linear layers).

    value: (N, S, H, D), the levels one after the other, each in row-major order. float64, float32, float16, bfloat16.
    spatial_shapes: L pairs (height, width) with sum of height * width = S. A CUDA tensor costs a device
        synchronisation and a tensor cannot be traced by torch.compile: prefer a list.
    sampling_locations: (N, Q, H, L, P, 2), (x, y) in [0, 1] of the map; pixel centres lie at half-integers;
        a location outside samples zeros. A non-finite one makes that query's head NaN, and no other.
    attention_weights: (N, Q, H, L, P), used as given.
    Returns (N, Q, H*D) in value's dtype; sums are float32 or better.

    With a value that is not float64, locations and weights may be float32, float16 or bfloat16 (autocast leaves
    the arguments as they are). Raises TypeError and ValueError naming the argument, and OSError without a binary.
    On CUDA the gradient of value is summed by atomics: its backward pass raises RuntimeError under
    torch.use_deterministic_algorithms(True). A second derivative raises NotImplementedError.
    """
    shapes = _flat_shapes(spatial_shapes)
    _check_value(value, shapes)
    batch, _, heads, _ = value.shape
    levels = len(shapes) // 2
    _check_companion(value, "sampling_locations", sampling_locations)
    _check_companion(value, "attention_weights", attention_weights)
    _check_points("sampling_locations", sampling_locations, batch, heads, levels)
    if attention_weights.shape != sampling_locations.shape[:5]:
        raise ValueError(
            f"attention_weights must have shape (N, Q, H, L, P) = {tuple(sampling_locations.shape[:5])}, "
            f"got {tuple(attention_weights.shape)}"
        )
    locations, weights = _one_dtype(value, sampling_locations, attention_weights)
    return torch.ops.ddetr.deform_attn(value, shapes, locations, weights)


def fused_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`deform_attn` with the softmax over the L*P logits and the location arithmetic inside the kernel.

    value, spatial_shapes: as for `deform_attn`.
    reference_points: (N, Q, L, 2) as (x, y), location = reference + offset / (width, height of the level);
        or (N, Q, L, 4) as (cx, cy, w, h), location = (cx, cy) + offset / P * (w, h) * 0.5. In [0, 1] of the map.
    sampling_offsets: (N, Q, H, L, P, 2), as (x, y).
    attention_logits: (N, Q, H, L*P).
    Returns (N, Q, H*D) in value's dtype. Types and errors as for `deform_attn`.
    """
    shapes = _flat_shapes(spatial_shapes)
    _check_value(value, shapes)
    batch, _, heads, _ = value.shape
    levels = len(shapes) // 2
    _check_companion(value, "reference_points", reference_points)
    _check_companion(value, "sampling_offsets", sampling_offsets)
    _check_companion(value, "attention_logits", attention_logits)
    _check_points("sampling_offsets", sampling_offsets, batch, heads, levels)
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[4]
    if reference_points.dim() != 4 or (
        reference_points.shape[0] != batch
        or reference_points.shape[1] != queries
        or reference_points.shape[2] != levels
        or reference_points.shape[3] not in (2, 4)
    ):
        raise ValueError(
            f"reference_points must have shape (N, Q, L, 2 or 4) = ({batch}, {queries}, {levels}, 2 or 4), "
            f"got {tuple(reference_points.shape)}"
        )
    if attention_logits.dim() != 4 or (
        attention_logits.shape[0] != batch
        or attention_logits.shape[1] != queries
        or attention_logits.shape[2] != heads
        or attention_logits.shape[3] != levels * points
    ):
        raise ValueError(
            f"attention_logits must have shape (N, Q, H, L*P) = ({batch}, {queries}, {heads}, {levels * points}), "
            f"got {tuple(attention_logits.shape)}"
        )
    reference, offsets, logits = _one_dtype(value, reference_points, sampling_offsets, attention_logits)
    return torch.ops.ddetr.fused_deform_attn(value, shapes, reference, offsets, logits)


def _flat_shapes(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> list[int]:
    """[h0, w0, h1, w1, ...]: plain integers reach the kernels without a device synchronisation."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.is_floating_point():
            raise ValueError(
                f"spatial_shapes must be an integer tensor of shape (L, 2), got {spatial_shapes.dtype} "
                f"of shape {tuple(spatial_shapes.shape)}"
            )
        spatial_shapes = spatial_shapes.tolist()
    flat: list[int] = []
    for shape in spatial_shapes:
        if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 2:
            raise ValueError(f"spatial_shapes must hold pairs (height, width), got {shape!r}")
        height, width = shape
        if isinstance(height, float) or isinstance(width, float):
            raise TypeError(f"spatial_shapes must hold pairs of int (height, width), got {shape!r}")
        if height <= 0 or width <= 0:
            raise ValueError(f"spatial_shapes must hold positive (height, width), got {shape!r}")
        flat += [height, width]
    if not flat:
        raise ValueError("spatial_shapes must hold at least one (height, width), got none")
    return flat


def _check_value(value: Tensor, shapes: list[int]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"value must be a tensor, got {type(value).__name__}")
    if value.dtype not in _VALUE_TYPES:
        raise TypeError(f"value must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if value.dim() != 4:
        raise ValueError(f"value must have shape (N, S, H, D), got {tuple(value.shape)}")
    positions = sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True))
    if value.shape[1] != positions:
        raise ValueError(
            f"value must have S = sum of height * width = {positions} positions for spatial_shapes "
            f"{list(zip(shapes[::2], shapes[1::2], strict=True))}, got {value.shape[1]} in shape {tuple(value.shape)}"
        )
    if value.device.type in UNAVAILABLE:
        raise OSError(f"ddetr.ops cannot run on {value.device.type}: {UNAVAILABLE[value.device.type]}")
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"value must be on a cpu or cuda device, got {value.device}")


def _check_companion(value: Tensor, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if value.dtype == torch.float64:
        if tensor.dtype != torch.float64:
            raise TypeError(f"{name} must be float64 beside a float64 value, got {tensor.dtype}")
    elif tensor.dtype != torch.float32 and tensor.dtype not in _HALF_TYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16 beside a {value.dtype} value, got {tensor.dtype}")
    if tensor.device != value.device:
        raise ValueError(f"{name} must be on value's device {value.device}, got {tensor.device}")


def _check_points(name: str, tensor: Tensor, batch: int, heads: int, levels: int) -> None:
    shape = tuple(tensor.shape)
    if len(shape) != 6 or shape[0] != batch or shape[2:4] != (heads, levels) or shape[5] != 2:
        raise ValueError(
            f"{name} must have shape (N, Q, H, L, P, 2) = ({batch}, Q, {heads}, {levels}, P, 2), got {shape}"
        )


def _one_dtype(value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels read these tensors all in value's dtype or all in float32; widening is exact."""
    if all(tensor.dtype == value.dtype for tensor in tensors):
        return tensors
    return tuple(tensor.float() for tensor in tensors)


# What torch needs to know in addition to the kernels: shapes for tracing (fake) and gradients. The stable ABI has no
# autograd, hence Python over separate forward and backward operators.


def _output_like(value: Tensor, queries_like: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], queries_like.shape[1], value.shape[2] * value.shape[3]))


def _fake_forward(value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, weights: Tensor) -> Tensor:
    return _output_like(value, sampling_locations)


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, sampling_locations, weights))


def _fake_fused_forward(
    value: Tensor, spatial_shapes: list[int], reference_points: Tensor, sampling_offsets: Tensor, logits: Tensor
) -> Tensor:
    return _output_like(value, sampling_offsets)


def _fake_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    logits: Tensor,
    needs_reference_gradient: bool,
) -> tuple[Tensor, ...]:
    batch, queries, levels, coordinates = reference_points.shape
    heads = value.shape[2]
    reference_shape = (batch, queries, heads, levels, coordinates) if needs_reference_gradient else (0,)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return (
        value.new_empty(value.shape),
        reference_points.new_empty(reference_shape, dtype=dtype),
        sampling_offsets.new_empty(sampling_offsets.shape),
        logits.new_empty(logits.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(context: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = context.saved_tensors
    _refuse_when_deterministic("deform_attn_backward", value)
    grad_value, grad_locations, grad_weights = torch.ops.ddetr.deform_attn_backward(
        grad_output, value, context.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _fused_backward(context: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, reference_points, sampling_offsets, attention_logits = context.saved_tensors
    _refuse_when_deterministic("fused_deform_attn_backward", value)
    grad_value, grad_reference, grad_offsets, grad_logits = torch.ops.ddetr.fused_deform_attn_backward(
        grad_output,
        value,
        context.spatial_shapes,
        reference_points,
        sampling_offsets,
        attention_logits,
        context.needs_input_grad[2],
    )
    # The kernel gives the reference points' gradient by head, (N, Q, H, L, 2 or 4): a fixed order of summation.
    reference = grad_reference.sum(2).to(reference_points.dtype) if context.needs_input_grad[2] else None
    return grad_value, None, reference, grad_offsets, grad_logits


def _refuse_when_deterministic(operator: str, value: Tensor) -> None:
    """On CUDA the gradient of value is summed by atomics, whose order differs from run to run."""
    if not value.is_cuda or not torch.are_deterministic_algorithms_enabled():
        return
    message = f"ddetr::{operator} has no deterministic implementation on CUDA"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"{message}, but torch.use_deterministic_algorithms(True) is set")
    warnings.warn(message, stacklevel=2)


def _refuse_double_backward(context: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ddetr.ops has no second derivative: deform_attn and fused_deform_attn cannot be differentiated twice. "
        "ddetr.ops.reference can, if the gradient of a gradient is needed"
    )


if "cpu" not in UNAVAILABLE:
    for _name, _fake, _gradient, _setup in (
        ("deform_attn", _fake_forward, _backward, _save),
        ("deform_attn_backward", _fake_backward, _refuse_double_backward, None),
        ("fused_deform_attn", _fake_fused_forward, _fused_backward, _save),
        ("fused_deform_attn_backward", _fake_fused_backward, _refuse_double_backward, None),
    ):
        torch.library.register_fake(f"ddetr::{_name}", _fake)
        torch.library.register_autograd(f"ddetr::{_name}", _gradient, setup_context=_setup)
