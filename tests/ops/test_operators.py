"""Both operators on the CPU against the specification, forward and backward, on every instruction set."""

from collections.abc import Callable

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn, library, reference
from torch import Tensor

from tests.golden.reference_outputs import load

SHAPES = [(6, 7), (3, 4), (2, 1)]


@pytest.mark.parametrize("channels", [1, 5, 16, 24, 32, 64, 72])
def test_plain_agrees_for_any_channels(
    cpu_path: str, channels: int, plain_arguments: Callable[..., list[Tensor]], assert_agrees: Callable[..., None]
) -> None:
    assert_agrees(deform_attn, SHAPES, plain_arguments(channels=channels))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("channels", [5, 16, 32, 64])
def test_fused_agrees_for_any_channels(
    cpu_path: str,
    channels: int,
    coordinates: int,
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> None:
    assert_agrees(fused_deform_attn, SHAPES, fused_arguments(channels=channels, coordinates=coordinates))


@pytest.mark.parametrize("channels", [20, 32])
def test_types_agree(
    cpu_path: str,
    types: tuple[torch.dtype, torch.dtype],
    channels: int,
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> None:
    assert_agrees(deform_attn, SHAPES, plain_arguments(*types, channels=channels))
    assert_agrees(fused_deform_attn, SHAPES, fused_arguments(*types, channels=channels))


def test_float64_agrees(
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> None:
    assert_agrees(deform_attn, SHAPES, plain_arguments(torch.float64, channels=7))
    for coordinates in (2, 4):
        assert_agrees(fused_deform_attn, SHAPES, fused_arguments(torch.float64, channels=8, coordinates=coordinates))


@pytest.mark.parametrize(
    "sizes",
    [
        {"points": 1, "shapes": [(5, 4)]},
        {"points": 3, "heads": 1},
        {"points": 16, "batch": 1},
        {"queries": 0},
        {"batch": 0},
        {"points": 0},
        {"heads": 8, "queries": 40, "shapes": [(1, 1), (2, 9)]},
        # Few reads of many rows: values and their gradients are used in place, without a dense copy.
        {"queries": 2, "points": 1, "shapes": [(30, 31)]},
        {"queries": 2, "points": 1, "shapes": [(30, 31)], "channels": 24},
    ],
    ids=str,
)
def test_sizes_agree(
    cpu_path: str,
    sizes: dict,
    plain_arguments: Callable[..., list[Tensor]],
    fused_arguments: Callable[..., list[Tensor]],
    assert_agrees: Callable[..., None],
) -> None:
    shapes = sizes.get("shapes", SHAPES)
    assert_agrees(deform_attn, shapes, plain_arguments(**sizes))
    assert_agrees(fused_deform_attn, shapes, fused_arguments(**sizes))


def test_non_contiguous_arguments_and_gradient(fused_arguments: Callable[..., list[Tensor]]) -> None:
    dense = fused_arguments()
    strided = [a.transpose(0, 1).contiguous().transpose(0, 1) for a in dense]
    assert not any(a.is_contiguous() for a in strided)
    results = []
    for arguments in (dense, strided):
        leaves = [a.detach().requires_grad_() for a in arguments]
        output = fused_deform_attn(leaves[0], SHAPES, *leaves[1:])
        # The gradient of a transposed sum is not contiguous either.
        output.transpose(1, 2).mul(torch.arange(output.shape[1])).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for expected, result in zip(*results, strict=True):
        assert torch.equal(expected, result)


def test_spatial_shapes_may_be_a_tensor(plain_arguments: Callable[..., list[Tensor]]) -> None:
    value, locations, weights = plain_arguments()
    expected = deform_attn(value, SHAPES, locations, weights)
    assert torch.equal(deform_attn(value, torch.tensor(SHAPES), locations, weights), expected)


def test_gradients_do_not_depend_on_the_number_of_threads(fused_arguments: Callable[..., list[Tensor]]) -> None:
    arguments = fused_arguments(queries=50)
    results = []
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2, 7, 64):
            torch.set_num_threads(count)
            leaves = [a.detach().requires_grad_() for a in arguments]
            output = fused_deform_attn(leaves[0], SHAPES, *leaves[1:])
            output.square().sum().backward()
            results.append([output, *(leaf.grad for leaf in leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_locations_outside_and_on_the_border(cpu_path: str) -> None:
    """A map of ones: the output is the part of the pixel's square that lies inside the map."""
    value = torch.ones(1, 12, 1, 8)
    x = torch.tensor([0.0, 1.0, 0.5, -0.125, 1.125, 1.2, -1e30, 1e30, 3.4e38])
    expected = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1).view(1, -1, 1, 1, 1, 2)
    output = deform_attn(value, [(3, 4)], locations, torch.ones(1, len(x), 1, 1, 1))
    torch.testing.assert_close(output, expected[None, :, None].expand(-1, -1, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_point_poisons_its_query_alone(
    cpu_path: str, bad: float, plain_arguments: Callable[..., list[Tensor]]
) -> None:
    for poisoned in (1, 2):  # locations, weights
        arguments = plain_arguments()
        clean = deform_attn(arguments[0], SHAPES, *arguments[1:])
        arguments[poisoned][1, 4, 2, 1, 3] = bad
        leaves = [a.detach().requires_grad_() for a in arguments]
        output = deform_attn(leaves[0], SHAPES, *leaves[1:])
        heads = output.detach().view(2, -1, 3, 16)
        assert heads[1, 4, 2].isnan().all()
        heads[1, 4, 2] = clean.view(2, -1, 3, 16)[1, 4, 2]
        assert torch.equal(output.detach(), clean)
        # The gradients of all other queries stay finite, and a point without a place reaches no value.
        others = torch.ones(2, 11, dtype=torch.bool)
        others[1, 4] = False
        output[others].sum().backward()
        assert leaves[1].grad is not None
        assert leaves[1].grad[others].isfinite().all()


def test_a_non_finite_value_reaches_only_queries_that_sample_it(cpu_path: str) -> None:
    value = torch.ones(1, 12, 1, 8)
    value[0, 0] = float("nan")  # the top left pixel of a map of 3 x 4
    locations = torch.tensor([[0.125, 1 / 6], [0.625, 0.5], [-5.0, -5.0], [0.9, 1.4]]).view(1, 4, 1, 1, 1, 2)
    output = deform_attn(value, [(3, 4)], locations, torch.ones(1, 4, 1, 1, 1))
    assert output.isnan().all(-1).tolist() == [[True, False, False, False]]


def test_half_sums_are_float32() -> None:
    """4096 points of weight 1/4096 in float16: sums in float16 would stop at 0.5 or lose the small parts."""
    value = torch.ones(1, 4, 1, 8, dtype=torch.float16)
    locations = torch.full((1, 1, 1, 1, 4096, 2), 0.5, dtype=torch.float16)
    weights = torch.full((1, 1, 1, 1, 4096), 1 / 4096, dtype=torch.float16)
    assert torch.equal(deform_attn(value, [(2, 2)], locations, weights), torch.ones(1, 1, 8, dtype=torch.float16))


def test_golden() -> None:
    """The published implementation's attention core, in float64 with gradients: tests/golden/README.md."""
    cases = load("attention_core")["cases"]
    assert len(cases) == 2
    for case in cases:
        leaves = [case[name].requires_grad_() for name in ("value", "locations", "weights")]
        for operator in (deform_attn, reference.deform_attn):
            output = operator(leaves[0], case["shapes"], *leaves[1:])
            torch.testing.assert_close(output, case["output"], rtol=0, atol=1e-12)
            gradients = torch.autograd.grad(output, leaves, case["output_gradient"])
            for gradient, name in zip(gradients, ("value", "locations", "weights"), strict=True):
                torch.testing.assert_close(gradient, case[f"{name}_gradient"], rtol=0, atol=1e-12)


def test_a_single_point_is_deformable_convolution() -> None:
    """L = 1, P = 1, weight 1 (the paper's appendix A.1): a 1x1 deformable convolution with the identity as kernel."""
    deform_conv2d = pytest.importorskip("torchvision.ops").deform_conv2d
    torch.manual_seed(0)
    height, width, channels = 7, 9, 4
    image = torch.randn(2, channels, height, width, dtype=torch.float64)
    offsets = torch.randn(2, 2, height, width, dtype=torch.float64) * 2  # (y, x)
    expected = deform_conv2d(image, offsets, torch.eye(channels, dtype=torch.float64)[:, :, None, None])
    references = _centres(height, width).view(1, -1, 1, 2).expand(2, -1, -1, -1)
    output = fused_deform_attn(
        image.flatten(2).transpose(1, 2)[:, :, None],
        [(height, width)],
        references,
        offsets.flip(1).flatten(2).transpose(1, 2).reshape(2, -1, 1, 1, 1, 2),
        torch.zeros(2, height * width, 1, 1, dtype=torch.float64),
    )
    torch.testing.assert_close(output.transpose(1, 2).view_as(expected), expected)


def test_sampling_every_position_is_ordinary_attention() -> None:
    torch.manual_seed(0)
    height, width, heads, queries = 4, 5, 2, 6
    value = torch.randn(1, height * width, heads, 8, dtype=torch.float64)
    logits = torch.randn(1, queries, heads, height * width, dtype=torch.float64)
    centres = _centres(height, width).expand(1, queries, heads, 1, -1, 2)
    weights = logits.softmax(-1)
    output = deform_attn(value, [(height, width)], centres, weights.unsqueeze(3))
    torch.testing.assert_close(output, torch.einsum("nqhs,nshd->nqhd", weights, value).flatten(2))


def test_capability_limit_is_checked() -> None:
    with pytest.raises(RuntimeError, match="portable, avx2 or avx512, got sse9"):
        library.cpu_capability("sse9")


def _centres(height: int, width: int) -> Tensor:
    """Pixel centres as (x, y) in [0, 1]: (height * width, 2)."""
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    return torch.cartesian_prod(y, x).flip(1)
