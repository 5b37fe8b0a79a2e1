"""The CUDA kernels' own sources, compiled for the CPU, against the specification: for machines without a GPU.

emulation/kernels.cpp says what this shows and what not. The emulated kernels take the place of the CPU's, so that the
public functions reach them through all that stands between: checks, types, gradients.
"""

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn, library, reference
from torch import Tensor
from torch.library import _scoped_library

pytestmark = pytest.mark.skipif("cpu" in library.UNAVAILABLE, reason=library.UNAVAILABLE.get("cpu", ""))

EMULATION = Path(__file__).parent / "emulation"
KERNELS = Path(__file__).parents[2] / "ops/csrc"
SANITIZERS = (
    "-fsanitize=address,alignment,bounds,float-cast-overflow,signed-integer-overflow",
    "-fno-sanitize-recover=all",
)
SHAPES = [(6, 7), (3, 4), (2, 1)]
TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # Type in cuda_kernels.cuh
PATHS = [pytest.param(16, "tuned", id="tuned"), pytest.param(12, "generic", id="generic")]  # channels and path


class Emulator:
    """The program as a process that answers problem after problem, until a mistake of a kernel ends it."""

    def __init__(self, program: Path) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([program], stdin=pipe, stdout=pipe, stderr=pipe)
        self.paths: set[str] = set()  # which ran: "tuned", "generic"

    def close(self) -> None:
        self.process.communicate()

    # The operators as library.cpp declares them; `points` are locations and weights, or reference points, offsets and
    # logits.

    def forward(self, value: Tensor, shapes: list[int], *points: Tensor) -> Tensor:
        output = value.new_empty(*points[-2].shape[:2], value.shape[2] * value.shape[3])
        return self._run([output], value, shapes, points)[0]

    def backward(self, gradient: Tensor, value: Tensor, shapes: list[int], *points: Tensor) -> tuple[Tensor, ...]:
        grad_value, _, grad_locations, grad_weights = self.fused_backward(gradient, value, shapes, *points, False)
        return grad_value, grad_locations, grad_weights

    def fused_backward(self, gradient: Tensor, value: Tensor, shapes: list[int], *rest: Any) -> tuple[Tensor, ...]:
        *points, needs_reference_gradient = rest
        sums = torch.empty(value.shape, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
        by_head = sums.new_empty(0)
        if needs_reference_gradient:
            by_head = sums.new_empty(*points[1].shape[:4], points[0].shape[3])
        results = [sums, by_head, *(torch.empty_like(tensor) for tensor in points[-2:])]
        results = self._run(results, value, shapes, points, gradient, needs_reference_gradient)
        return results[0].to(value.dtype), *results[1:]

    def _run(
        self,
        like: list[Tensor],
        value: Tensor,
        shapes: list[int],
        points: Sequence[Tensor],
        gradient: Tensor | None = None,
        needs_reference_gradient: bool = False,
    ) -> list[Tensor]:
        """Results with the shapes and types of `like`."""
        coordinates = points[-2]
        header = [gradient is not None, TYPE_NUMBERS[value.dtype], TYPE_NUMBERS[coordinates.dtype]]
        header += [*value.shape, coordinates.shape[1], *coordinates.shape[3:5]]
        header += [points[0].shape[3] if len(points) == 3 else 0, needs_reference_gradient, *shapes]
        tensors = [value, *points] if gradient is None else [value, *points, gradient]
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(struct.pack(f"{len(header)}q", *header))
            for tensor in tensors:
                self.process.stdin.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        self.paths.add("tuned" if struct.unpack("q", self._read(8))[0] else "generic")
        results = []
        for tensor in like:
            raw = bytearray(self._read(tensor.numel() * tensor.element_size()))
            flat = torch.frombuffer(raw, dtype=tensor.dtype) if raw else tensor.new_empty(0)
            results.append(flat.view(tensor.shape))
        return results

    def _read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(count)
        if len(data) < count:
            self._fail()
        return data

    def _fail(self) -> NoReturn:
        _, message = self.process.communicate()
        raise AssertionError(f"the emulation ended with {self.process.returncode}: {message.decode()[:4000]}")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler: install g++, or set CXX to yours")
    program = tmp_path_factory.mktemp("emulation") / "kernels"
    # -Og compiles in half the time of -O1, and the tests take no longer.
    command = [compiler, "-std=c++20", "-Og", "-g1", *SANITIZERS, "-o", str(program)]
    probe = subprocess.run([*command, "-x", "c++", "-"], input=b"int main() {}", capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"{compiler} lacks C++20 or its sanitizers, without which half of the mistakes would pass")
    command += [f"-I{EMULATION}", f"-I{KERNELS}", "-isystem", str(Path(torch.__file__).parent / "include")]
    command += [str(EMULATION / "kernels.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return program


@pytest.fixture
def emulator(program: Path) -> Iterator[Emulator]:
    """The emulated kernels in the place of the CPU's; the CPU's again afterwards."""
    emulator = Emulator(program)
    with _scoped_library("ddetr", "IMPL") as scope:
        scope.impl("deform_attn", emulator.forward, "CPU")
        scope.impl("deform_attn_backward", emulator.backward, "CPU")
        scope.impl("fused_deform_attn", emulator.forward, "CPU")
        scope.impl("fused_deform_attn_backward", emulator.fused_backward, "CPU")
        yield emulator
    emulator.close()


@pytest.fixture
def assert_all_agree(
    emulator: Emulator,
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> Callable[..., None]:
    """Both operators, the fused one with both kinds of reference points, on the path named."""

    def check(path: str, dtype: torch.dtype, point_dtype: torch.dtype, **sizes: Any) -> None:
        shapes = sizes.get("shapes", SHAPES)
        assert_agrees(deform_attn, shapes, plain_arguments(dtype, point_dtype, **sizes))
        for coordinates in (2, 4):
            arguments = fused_arguments(dtype, point_dtype, coordinates=coordinates, **sizes)
            assert_agrees(fused_deform_attn, shapes, arguments)
        assert emulator.paths == {path}

    return check


@pytest.mark.integration
@pytest.mark.parametrize("channels", [16, 32, 64])
def test_tuned_agrees(
    types: tuple[torch.dtype, torch.dtype], channels: int, assert_all_agree: Callable[..., None]
) -> None:
    assert_all_agree("tuned", *types, channels=channels)


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "queries": 1, "heads": 1, "points": 1, "shapes": [(1, 1)]},
        {"batch": 1, "queries": 1, "heads": 1},
        {"batch": 1, "queries": 8, "heads": 8},  # fills its blocks
        {"points": 10},
        {"points": 8, "shapes": [(5, 9), (4, 4), (1, 3), (2, 2)]},  # as many points as the path takes
        {"points": 32, "shapes": [(7, 5)]},
        {"points": 2, "shapes": [(1 + i % 3, 1 + i % 5) for i in range(16)]},
        {"points": 1, "shapes": [(2, 3)] * 32, "queries": 2},
        {"points": 10, "channels": 64, "queries": 5},  # fewer threads in a block, for the sake of shared memory
        {"points": 10, "channels": 32, "queries": 5},
    ],
    ids=str,
)
def test_tuned_sizes_agree(dtype: torch.dtype, sizes: dict, assert_all_agree: Callable[..., None]) -> None:
    assert_all_agree("tuned", dtype, dtype, **sizes)


GENERIC = pytest.mark.parametrize("sizes", [{"channels": 5}, {"channels": 24}, {"channels": 32, "points": 11}], ids=str)


@pytest.mark.integration
@GENERIC
def test_generic_agrees(
    types: tuple[torch.dtype, torch.dtype], sizes: dict, assert_all_agree: Callable[..., None]
) -> None:
    assert_all_agree("generic", *types, **sizes)


@pytest.mark.integration
@GENERIC
def test_generic_agrees_in_float64(sizes: dict, assert_all_agree: Callable[..., None]) -> None:
    assert_all_agree("generic", torch.float64, torch.float64, **sizes)


@pytest.mark.integration
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 1, "queries": 1, "heads": 1, "points": 1, "channels": 1}, {"points": 70}, {"shapes": [(1, 2)] * 40}],
    ids=str,
)
def test_generic_sizes_agree(sizes: dict, assert_all_agree: Callable[..., None]) -> None:
    assert_all_agree("generic", torch.float32, torch.float32, **sizes)


@pytest.mark.integration
@pytest.mark.parametrize(("channels", "path"), PATHS)
@pytest.mark.parametrize("sizes", [{"queries": 0}, {"batch": 0}, {"points": 0}], ids=str)
def test_nothing_to_sample(sizes: dict, channels: int, path: str, assert_all_agree: Callable[..., None]) -> None:
    assert_all_agree(path, torch.float32, torch.float32, channels=channels, **sizes)


@pytest.mark.integration
@pytest.mark.parametrize(("channels", "path"), PATHS)
def test_reference_points_without_a_gradient(
    channels: int, path: str, emulator: Emulator, fused_arguments: Callable[..., list[Tensor]]
) -> None:
    results = []
    for wanted in (True, False):
        leaves = [a.requires_grad_() for a in fused_arguments(channels=channels)]
        leaves[1].requires_grad_(wanted)
        fused_deform_attn(leaves[0], SHAPES, *leaves[1:]).square().sum().backward()
        assert (leaves[1].grad is not None) == wanted
        results.append([leaf.grad for leaf in (leaves[0], *leaves[2:])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert emulator.paths == {path}


@pytest.mark.integration
@pytest.mark.parametrize(("channels", "path"), PATHS)
@pytest.mark.parametrize("operator", [deform_attn, fused_deform_attn], ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("position", [-2, -1], ids=["location", "weight"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_point_that_is_not_finite_poisons_its_item_alone(
    bad: float,
    position: int,
    operator: Callable[..., Tensor],
    channels: int,
    path: str,
    emulator: Emulator,
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
) -> None:
    make = plain_arguments if operator is deform_attn else fused_arguments
    arguments = make(channels=channels)
    item = (1, 4, 2)
    results = []
    for poisoned in (False, True):
        leaves = [a.clone() for a in arguments]
        if poisoned:
            leaves[position][item].view(-1)[-1] = bad
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = operator(leaves[0], SHAPES, *leaves[1:])
        heads = output.view(2, 11, 3, channels)
        # The item's own gradient is zero, so that the gradients of value and reference points may stay finite.
        cotangent = torch.ones_like(heads)
        cotangent[item] = 0
        heads.backward(cotangent)
        by_item = [heads.detach(), *(leaf.grad.view(2, 11, 3, -1) for leaf in leaves[-2:])]
        if poisoned:
            assert by_item[0][item].isnan().all()
            assert by_item[-1][item].isnan().any()
        for tensor in by_item:
            tensor[item] = 0
        results.append(by_item)
        # A point without a place reaches no value; one without a weight does.
        assert not poisoned or position == -1 or operator is fused_deform_attn or leaves[0].grad.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert emulator.paths == {path}


@pytest.mark.integration
@pytest.mark.parametrize(("channels", "path"), PATHS)
def test_far_away_samples_nothing(channels: int, path: str, emulator: Emulator) -> None:
    """A map of ones: the output is the part of the pixel's square that lies inside the map."""
    value = torch.ones(1, 12, 1, channels)
    x = torch.tensor([0.0, 1.0, 0.5, -0.125, 1.125, 1.2, -1e30, 1e30, 3.4e38, -3.4e38])
    expected = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for axis in (0, 1):
        pair = [x, torch.full_like(x, 0.5)]
        locations = torch.stack(pair if axis == 0 else pair[::-1], -1).view(1, -1, 1, 1, 1, 2).requires_grad_()
        output = deform_attn(value, [(3, 4)] if axis == 0 else [(4, 3)], locations, torch.ones(1, len(x), 1, 1, 1))
        torch.testing.assert_close(output, expected[None, :, None].expand(-1, -1, channels))
        output.sum().backward()
        assert locations.grad is not None
        assert not locations.grad[:, 5:].any()
    assert emulator.paths == {path}


@pytest.mark.integration
@pytest.mark.parametrize(("channels", "path"), PATHS)
def test_a_value_that_is_not_finite_reaches_only_items_that_sample_it(
    channels: int, path: str, emulator: Emulator
) -> None:
    value = torch.ones(1, 12, 1, channels)
    value[0, 0] = torch.nan  # the top left pixel of a map of 3 x 4
    locations = torch.tensor([[0.125, 1 / 6], [0.625, 0.5], [-5.0, -5.0], [0.9, 1.4]]).view(1, 4, 1, 1, 1, 2)
    output = deform_attn(value, [(3, 4)], locations, torch.ones(1, 4, 1, 1, 1))
    assert output.isnan().all(-1).tolist() == [[True, False, False, False]]
    assert emulator.paths == {path}


@pytest.mark.integration
@pytest.mark.parametrize(("channels", "path"), PATHS)
def test_a_logit_of_minus_infinity_masks_its_point(
    channels: int, path: str, emulator: Emulator, fused_arguments: Callable[..., list[Tensor]]
) -> None:
    arguments = fused_arguments(channels=channels)
    arguments[3][..., ::2] = -torch.inf
    results = []
    for operator in (fused_deform_attn, reference.fused_deform_attn):
        leaves = [a.clone().requires_grad_() for a in arguments]
        output = operator(leaves[0], SHAPES, *leaves[1:])
        output.square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert emulator.paths == {path}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("read_beyond", "heap-buffer-overflow"),
        ("read_beyond_shared", "use-after-poison"),
        ("read_misaligned", "misaligned address"),
        ("return_before_a_shuffle", "lane 5 has returned"),
        ("shuffle_in_two_places", "lane 5 is elsewhere"),
        ("read_without_syncwarp", "not a number"),
    ],
)
def test_a_mistake_of_a_kernel_is_noticed(mistake: str, message: str, program: Path) -> None:
    result = subprocess.run([program, mistake], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode != 0
    assert message in result.stderr
