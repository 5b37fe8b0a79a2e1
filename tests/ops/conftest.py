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

    The specification runs in float64 on the same numbers, so the error is the operator's alone. The bound is the
    rounding of each result's own type once (half types), plus float32 sums of a few hundred terms at locations
    that float32 places to within a few units in the last place of the map's side.
    """

    def check(operator: Callable[..., Tensor], shapes: Shapes, arguments: list[Tensor]) -> None:
        specification = getattr(reference, operator.__name__)
        exact_arguments = [a.detach().to("cpu", torch.float64).requires_grad_() for a in arguments]
        arguments = [a.detach().requires_grad_() for a in arguments]
        output = operator(arguments[0], shapes, *arguments[1:])
        exact = specification(exact_arguments[0], shapes, *exact_arguments[1:])
        generator = torch.Generator().manual_seed(7)
        gradient = torch.randn(exact.shape, generator=generator).to(output.dtype)
        output.backward(gradient.to(output.device))
        exact.backward(gradient.to(torch.float64))
        assert output.dtype == arguments[0].dtype
        _assert_close("output", output, exact, shapes)
        for index, (argument, exact_argument) in enumerate(zip(arguments, exact_arguments, strict=True)):
            assert argument.grad is not None
            assert argument.grad.dtype == argument.dtype
            _assert_close(f"gradient of argument {index}", argument.grad, exact_argument.grad, shapes)

    return check


@pytest.fixture(params=["avx512", "avx2", "portable"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn; the best one again afterwards."""
    if library.cpu_capability(request.param) != request.param:
        library.cpu_capability("avx512")
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.cpu_capability("avx512")


def _assert_close(name: str, result: Tensor, exact: Tensor | None, shapes: Shapes) -> None:
    assert exact is not None
    assert result.shape == exact.shape
    if exact.numel() == 0:
        return
    storage = torch.finfo(result.dtype).eps / 2
    working = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32).eps
    sums = working * (24 + 3 * max(max(shape) for shape in shapes)) * exact.abs().max()
    excess = (result.detach().cpu().double() - exact).abs() - (1.01 * storage * exact.abs() + sums)
    assert (excess <= 0).all(), f"{name} is off by {excess.max().item():.2e} more than rounding explains"


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
