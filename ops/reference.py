"""The specification of both operators, in plain torch.

The kernels are tested against these functions, forward and backward. For an encoder's call the functions need about
ten times the memory of the kernels and run many times slower. Nothing falls back to them: import `ddetr.ops.reference`
to use them.

Source: Zhu et al., Deformable DETR (arXiv 2010.04159), equation 3.

Shapes: N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

# Far outside every map, so that a non-finite location samples nothing before its query becomes NaN.
_OUTSIDE = -10.0


def deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values (equation 3); see `ddetr.ops.deform_attn` for the contract.

    value (N, S, H, D), sampling_locations (N, Q, H, L, P, 2), attention_weights (N, Q, H, L, P) -> (N, Q, H*D).
    """
    shapes = _pairs(spatial_shapes)
    dtype = _working_dtype(value)
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = sampling_locations.shape

    finite = sampling_locations.isfinite()
    locations = torch.where(finite, sampling_locations, _OUTSIDE).to(dtype)
    poison = torch.where(finite.all(-1) & attention_weights.isfinite(), 0.0, torch.nan).to(dtype)

    output = value.new_zeros((batch * heads, channels, queries), dtype=dtype)
    maps = value.to(dtype).split([height * width for height, width in shapes], dim=1)
    for level, (height, width) in enumerate(shapes):
        # (N, h*w, H, D) -> (N*H, D, h, w); grid_sample wants locations in [-1, 1].
        level_map = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled = grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = (attention_weights[:, :, :, level].to(dtype) + poison[:, :, :, level]).transpose(1, 2)
        # (N*H, D, Q, P) * (N*H, 1, Q, P)
        output = output + (sampled * weights.reshape(batch * heads, 1, queries, points)).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def fused_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`deform_attn` with the softmax and the location arithmetic; see `ddetr.ops.fused_deform_attn`.

    value (N, S, H, D), reference_points (N, Q, L, 2 or 4), sampling_offsets (N, Q, H, L, P, 2),
    attention_logits (N, Q, H, L*P) -> (N, Q, H*D).
    """
    shapes = _pairs(spatial_shapes)
    dtype = _working_dtype(value)
    points = sampling_offsets.shape[4]
    reference = reference_points.to(dtype)[:, :, None, :, None, :]  # (N, Q, 1, L, 1, 2 or 4)
    offsets = sampling_offsets.to(dtype)
    if reference_points.shape[-1] == 4:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    else:
        sizes = torch.tensor([(width, height) for height, width in shapes], dtype=dtype, device=value.device)
        locations = reference + offsets / sizes[:, None, :]
    weights = attention_logits.to(dtype).softmax(-1).view(sampling_offsets.shape[:-1])
    return deform_attn(value, shapes, locations, weights)


def _pairs(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(height, width) for height, width in rows]


def _working_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
