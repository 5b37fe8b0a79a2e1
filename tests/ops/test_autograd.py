"""Gradients against finite differences, and what torch's machinery needs: fakes, tracing, autocast."""

from collections.abc import Callable

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

SMALL = [(3, 4), (2, 2)]


def _leaves(arguments: list[Tensor]) -> list[Tensor]:
    return [a.detach().requires_grad_() for a in arguments]


def test_gradcheck_plain(plain_arguments: Callable[..., list[Tensor]]) -> None:
    leaves = _leaves(plain_arguments(torch.float64, shapes=SMALL, queries=2, heads=2, channels=3, points=2))
    assert torch.autograd.gradcheck(lambda v, *rest: deform_attn(v, SMALL, *rest), leaves)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gradcheck_fused(coordinates: int, fused_arguments: Callable[..., list[Tensor]]) -> None:
    sizes = {"shapes": SMALL, "queries": 2, "heads": 2, "channels": 3, "points": 2}
    leaves = _leaves(fused_arguments(torch.float64, coordinates=coordinates, **sizes))
    assert torch.autograd.gradcheck(lambda v, *rest: fused_deform_attn(v, SMALL, *rest), leaves)


def test_only_wanted_gradients(fused_arguments: Callable[..., list[Tensor]]) -> None:
    value, references, offsets, logits = fused_arguments()
    logits.requires_grad_()
    fused_deform_attn(value, [(6, 7), (3, 4), (2, 1)], references, offsets, logits).sum().backward()
    assert logits.grad is not None
    assert references.grad is None


def test_double_backward_is_refused(fused_arguments: Callable[..., list[Tensor]]) -> None:
    leaves = _leaves(fused_arguments(shapes=SMALL))
    output = fused_deform_attn(leaves[0], SMALL, *leaves[1:])
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_opcheck(plain_arguments: Callable[..., list[Tensor]], fused_arguments: Callable[..., list[Tensor]]) -> None:
    flat = [3, 4, 2, 2]
    value, *points = _leaves(plain_arguments(shapes=SMALL, queries=3, channels=4))
    torch.library.opcheck(torch.ops.ddetr.deform_attn.default, (value, flat, *points))
    fused = _leaves(fused_arguments(shapes=SMALL, queries=3, channels=4))
    torch.library.opcheck(torch.ops.ddetr.fused_deform_attn.default, (fused[0], flat, *fused[1:]))
    gradient = torch.randn(2, 3, 12)
    tests = ("test_schema", "test_faketensor")
    backward = (gradient, value.detach(), flat, *(p.detach() for p in points))
    torch.library.opcheck(torch.ops.ddetr.deform_attn_backward.default, backward, test_utils=tests)
    for wanted in (True, False):
        backward = (gradient, fused[0].detach(), flat, *(p.detach() for p in fused[1:]), wanted)
        torch.library.opcheck(torch.ops.ddetr.fused_deform_attn_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_changing_shapes(backend: str, fused_arguments: Callable[..., list[Tensor]]) -> None:
    """One graph for all sizes of the maps, the batch and the queries; forward and backward."""
    torch._dynamo.reset()

    def model(value: Tensor, shapes: list[tuple[int, int]], *rest: Tensor) -> Tensor:
        return fused_deform_attn(value * 2, shapes, *rest).relu()

    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    # Sizes that differ from each other, else tracing takes two equal ones for one.
    for height, batch, queries in ((5, 6, 7), (7, 9, 11), (9, 10, 13)):
        shapes = [(height, 8), (3, 4)]
        arguments = fused_arguments(shapes=shapes, batch=batch, queries=queries)
        results = []
        for function in (model, compiled):
            leaves = _leaves(arguments)
            output = function(leaves[0], shapes, *leaves[1:])
            output.sum().backward()
            results.append([output, *(leaf.grad for leaf in leaves)])
        for expected, result in zip(*results, strict=True):
            torch.testing.assert_close(result, expected)
    assert graphs.frame_count == 1


def test_autocast_leaves_locations_alone(fused_arguments: Callable[..., list[Tensor]]) -> None:
    """A linear layer under autocast gives a bfloat16 value; the reference points stay float32, and are used so."""
    value, references, offsets, logits = fused_arguments(shapes=SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = torch.nn.functional.linear(value, torch.eye(16))
        assert projected.dtype == torch.bfloat16
        output = fused_deform_attn(projected, SMALL, references, offsets.bfloat16(), logits)
    assert output.dtype == torch.bfloat16
    expected = fused_deform_attn(projected.float(), SMALL, references, offsets.bfloat16().float(), logits)
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=0)


def test_meta_device(plain_arguments: Callable[..., list[Tensor]]) -> None:
    value, locations, weights = (a.to("meta") for a in plain_arguments(torch.bfloat16, shapes=SMALL))
    output = deform_attn(value, SMALL, locations, weights)
    assert (output.device.type, output.dtype, output.shape) == ("meta", torch.bfloat16, (2, 11, 48))
