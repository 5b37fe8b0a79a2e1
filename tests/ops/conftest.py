"""Random arguments for both operators, and their comparison with the specification in float64.

Shapes: N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from ddetr.ops import library, reference
from torch import Tensor

Shapes = list[tuple[int, int]]
SHAPES: Shapes = [(6, 7), (3, 4), (2, 1)]


@pytest.fixture
def plain_arguments() -> Callable[..., list[Tensor]]:
    """value, sampling_locations (a fifth of them outside the maps), attention_weights."""

    def make(
        dtype: torch.dtype = torch.float32,
        point_dtype: torch.dtype | None = None,
        *,
        shapes: Shapes = SHAPES,
        batch: int = 2,
        queries: int = 11,
        heads: int = 3,
        channels: int = 16,
        points: int = 4,
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        positions, levels = sum(h * w for h, w in shapes), len(shapes)
        value = torch.randn(batch, positions, heads, channels, generator=generator)
        locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator) * 1.4 - 0.2
        weights = torch.randn(batch, queries, heads, levels, points, generator=generator)
        point_dtype = point_dtype or dtype
        return [value.to(dtype), _off_kinks(locations.to(point_dtype), shapes, generator), weights.to(point_dtype)]

    return make


@pytest.fixture
def fused_arguments() -> Callable[..., list[Tensor]]:
    """value, reference_points (of `coordinates` numbers), sampling_offsets, attention_logits."""

    def make(
        dtype: torch.dtype = torch.float32,
        point_dtype: torch.dtype | None = None,
        *,
        coordinates: int = 4,
        shapes: Shapes = SHAPES,
        batch: int = 2,
        queries: int = 11,
        heads: int = 3,
        channels: int = 16,
        points: int = 4,
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(6)
        positions, levels = sum(h * w for h, w in shapes), len(shapes)
        point_dtype = point_dtype or dtype
        value = torch.randn(batch, positions, heads, channels, generator=generator).to(dtype)
        references = torch.rand(batch, queries, levels, coordinates, generator=generator).to(point_dtype)
        offsets = torch.randn(batch, queries, heads, levels, points, 2, generator=generator).mul(2).to(point_dtype)
        logits = torch.randn(batch, queries, heads, levels * points, generator=generator).to(point_dtype)
        return [value, references, _fused_off_kinks(references, offsets, shapes, generator), logits]

    return make


@pytest.fixture
def assert_agrees() -> Callable[..., None]:
    """Runs an operator and its specification, forward and backward, and compares all results.

    The specification runs in float64 on the same numbers, so that the error is the operator's alone.
    """

    def check(operator: Callable[..., Tensor], shapes: Shapes, arguments: list[Tensor]) -> None:
        specification = getattr(reference, operator.__name__)
        exact_leaves = [a.detach().to("cpu", torch.float64).requires_grad_() for a in arguments]
        leaves = [a.detach().requires_grad_() for a in arguments]
        output = operator(leaves[0], shapes, *leaves[1:])
        exact = specification(exact_leaves[0], shapes, *exact_leaves[1:])
        assert output.dtype == leaves[0].dtype
        generator = torch.Generator().manual_seed(7)
        # Transposed in memory, as the gradient of a later transposition would be.
        gradient = torch.randn(exact.mT.shape, generator=generator).mT.to(output.dtype)
        output.backward(gradient.to(output.device))
        exact.backward(gradient.to(torch.float64))
        working = torch.float64 if output.dtype == torch.float64 else torch.float32
        limits = rounding(shapes, [a.detach() for a in exact_leaves], gradient.double(), torch.finfo(working).eps)
        results = [output, *(leaf.grad for leaf in leaves)]
        expected = [exact, *(leaf.grad for leaf in exact_leaves)]
        names = ["output", *(f"gradient of argument {index}" for index in range(len(leaves)))]
        for name, result, exact_result, limit in zip(names, results, expected, limits, strict=True):
            assert result is not None
            assert exact_result is not None
            assert result.shape == exact_result.shape
            assert name == "output" or result.dtype == leaves[names.index(name) - 1].dtype
            stored = torch.finfo(result.dtype)
            allowed = limit + 1.01 * stored.eps / 2 * exact_result.abs() + stored.eps * stored.tiny
            excess = ((result.detach().cpu().double() - exact_result).abs() - allowed).amax() if result.numel() else 0
            assert excess <= 0, f"{name} is off by {excess:.2e} more than rounding explains"

    return check


def rounding(shapes: Shapes, arguments: list[Tensor], gradient: Tensor, eps: float) -> list[Tensor]:
    """How far sums in a type with this `eps` may lie from the exact output and gradients; float64 in, float64 out.

    Each of n additions and products rounds once, so that a sum is off by at most about n * eps times the sum of its
    absolute terms. A location of magnitude r on a map of side w is off by a few eps * r * w pixels, and between two
    pixels the value changes by at most twice the largest value. docs/op.md gives the result in words.

    Locations must keep clear of pixel centres, where the gradient of a location jumps.
    """
    value, points = arguments[0], arguments[-2]  # sampling locations or offsets
    batch, queries, heads, levels, count, _ = points.shape
    sides = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    if len(arguments) == 3:
        weights, spread, reach = arguments[2].abs(), 0.0, points.abs().sum(-1)
        scale = torch.ones(1, dtype=torch.float64)
    else:
        logits, references = arguments[3], arguments[1][:, :, None, :, None]
        spread = (logits.amax(-1) - logits.amin(-1)).max() if logits.numel() else 0.0
        weights = logits.softmax(-1).view(points.shape[:-1])
        scale = references[..., 2:] * 0.5 / max(count, 1) if references.shape[-1] == 4 else 1 / sides
        reach = references[..., :2].abs().sum(-1) + (points * scale).abs().sum(-1)
    per_term = eps * (6 * levels * count + heads + 32 + float(spread))
    largest_reach = reach.max() if reach.numel() else 0.0
    pixels = 4 * eps * (1 + largest_reach) * sides.max()
    relative = per_term + 4 * pixels

    largest = value.abs().amax(1) if value.numel() else value.new_zeros((batch, *value.shape[2:]))  # (N, H, D)
    cotangent = gradient.abs().view(batch, queries, heads, value.shape[3])
    along = (cotangent * largest[:, None]).sum(-1)[..., None, None]  # (N, Q, H, 1, 1): of a point of weight 1
    output = relative * weights.sum((3, 4))[..., None] * largest[:, None]
    sharing = value.new_zeros(value.shape).requires_grad_()
    locations = points if len(arguments) == 3 else references[..., :2] + points * scale
    spreading = reference.deform_attn(sharing, shapes, locations, weights)
    (shared,) = torch.autograd.grad(spreading, sharing, cotangent.reshape(spreading.shape))
    touching = (weights.sum((3, 4))[..., None] * cotangent).sum(1, keepdim=True)  # (N, 1, H, D)
    most = shared.amax(1, keepdim=True) if shared.numel() else touching
    grad_value = (relative + eps * queries * levels * count) * most + 2 * pixels * touching
    grad_locations = 4 * relative * (weights * along)[..., None] * sides
    if len(arguments) == 3:
        return [output.flatten(2), grad_value, grad_locations, relative * along.expand(weights.shape)]
    moved = grad_locations.sum((2, 4))
    if references.shape[-1] == 4:
        stretched = (grad_locations * points.abs() * 0.5 / max(count, 1)).sum((2, 4))
        moved = torch.cat([moved, stretched], -1)
    grad_logits = 4 * relative * (weights * along).flatten(3)
    return [output.flatten(2), grad_value, moved, grad_locations * scale, grad_logits]


@pytest.fixture(
    params=[
        pytest.param((torch.float32, torch.float32), id="float32"),
        pytest.param((torch.bfloat16, torch.bfloat16), id="bfloat16"),
        pytest.param((torch.bfloat16, torch.float32), id="bfloat16-float32"),
        pytest.param((torch.float16, torch.float16), id="float16"),
        pytest.param((torch.float16, torch.float32), id="float16-float32"),
    ]
)
def types(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    """Of value, and of all other tensors."""
    return request.param


@pytest.fixture(params=["avx512", "avx2", "portable"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn; the best one again afterwards."""
    if library.cpu_capability(request.param) != request.param:
        library.cpu_capability("avx512")
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.cpu_capability("avx512")


# The gradient of a location jumps where a pixel's centre is crossed; a point that lies so near that float32 and
# float64 may fall on different sides says nothing about the kernel.


def _near_kinks(locations: Tensor, shapes: Shapes) -> Tensor:
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    pixels = locations.double() * sizes - 0.5
    return (pixels - pixels.round()).abs() < 1e-3


def _off_kinks(locations: Tensor, shapes: Shapes, generator: torch.Generator) -> Tensor:
    while (near := _near_kinks(locations, shapes)).any():
        fresh = torch.rand(locations.shape, generator=generator).to(locations.dtype)
        locations = torch.where(near, fresh, locations)
    return locations


def _fused_off_kinks(references: Tensor, offsets: Tensor, shapes: Shapes, generator: torch.Generator) -> Tensor:
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    expanded = references.double()[:, :, None, :, None]
    scale = expanded[..., 2:] * 0.5 / offsets.shape[4] if references.shape[-1] == 4 else 1 / sizes
    while (near := _near_kinks(expanded[..., :2] + offsets.double() * scale, shapes)).any():
        fresh = torch.randn(offsets.shape, generator=generator).to(offsets.dtype)
        offsets = torch.where(near, fresh, offsets)
    return offsets
