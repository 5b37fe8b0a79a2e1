"""The CUDA kernels against the specification, forward and backward: tuned and generic path, streams, graphs."""

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn, library
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("cuda" in library.UNAVAILABLE, reason=library.UNAVAILABLE.get("cuda", "")),
]

SHAPES = [(6, 7), (3, 4), (2, 1)]


def _on_gpu(arguments: list[Tensor]) -> list[Tensor]:
    return [a.cuda() for a in arguments]


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 16},
        {"channels": 32, "heads": 8},
        {"channels": 64},
        {"channels": 32, "points": 10},
        {"channels": 16, "points": 1, "queries": 1, "batch": 1},
        # What the tuned path does not take.
        {"channels": 24},
        {"channels": 5},
        {"channels": 32, "points": 11},
        {"queries": 0},
        {"batch": 0},
        {"points": 0},
    ],
    ids=str,
)
def test_agrees(
    types: tuple[torch.dtype, torch.dtype],
    sizes: dict,
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> None:
    assert_agrees(deform_attn, SHAPES, _on_gpu(plain_arguments(*types, **sizes)))
    for coordinates in (2, 4):
        arguments = fused_arguments(*types, coordinates=coordinates, **sizes)
        assert_agrees(fused_deform_attn, SHAPES, _on_gpu(arguments))


def test_float64_agrees(
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> None:
    assert_agrees(deform_attn, SHAPES, _on_gpu(plain_arguments(torch.float64)))
    assert_agrees(fused_deform_attn, SHAPES, _on_gpu(fused_arguments(torch.float64)))


def test_a_view_that_is_not_aligned_agrees(
    fused_arguments: Callable[..., list[Tensor]], assert_agrees: Callable[..., None]
) -> None:
    value, *rest = _on_gpu(fused_arguments(channels=32))
    shifted = torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value)
    assert shifted.data_ptr() % 16 != 0
    assert_agrees(fused_deform_attn, SHAPES, [shifted, *rest])


@pytest.mark.parametrize("channels", [24, 32])
def test_a_non_finite_location_poisons_its_query_alone(
    channels: int, plain_arguments: Callable[..., list[Tensor]]
) -> None:
    value, locations, weights = _on_gpu(plain_arguments(channels=channels))
    clean = deform_attn(value, SHAPES, locations, weights).view(2, -1, 3, channels)
    for bad in (torch.nan, torch.inf):
        locations[1, 4, 2, 1, 3, 0] = bad
        output = deform_attn(value, SHAPES, locations, weights).view(2, -1, 3, channels)
        assert output[1, 4, 2].isnan().all()
        output[1, 4, 2] = clean[1, 4, 2]
        assert torch.equal(output, clean)


def test_runs_on_the_current_stream_without_waiting(fused_arguments: Callable[..., list[Tensor]]) -> None:
    value, *rest = _on_gpu(fused_arguments(channels=32))
    expected = fused_deform_attn(value, SHAPES, *rest)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            output = fused_deform_attn(value, SHAPES, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(output, expected)


def test_a_graph_captures_forward_and_backward(fused_arguments: Callable[..., list[Tensor]]) -> None:
    leaves = [a.requires_grad_() for a in _on_gpu(fused_arguments(channels=32))]

    def step() -> tuple[Tensor, ...]:
        output = fused_deform_attn(leaves[0], SHAPES, *leaves[1:])
        return output, *torch.autograd.grad(output.sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact)


def test_deterministic_mode_refuses_the_backward(fused_arguments: Callable[..., list[Tensor]]) -> None:
    leaves = [a.requires_grad_() for a in _on_gpu(fused_arguments(channels=32))]
    output = fused_deform_attn(leaves[0], SHAPES, *leaves[1:])
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="no deterministic implementation on CUDA"):
            output.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    command += ["-p", "no:cacheprovider", __file__, "-k", "agrees or poisons"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-8000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "0 hazards displayed" in result.stdout
