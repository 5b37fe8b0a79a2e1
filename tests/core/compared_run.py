"""`ddetr train` that compares each call of the attention's op with the specification and writes to COMPARISONS how far
they are apart.

Both get the very arguments of the call, and in the backward pass the very gradient of its output: whatever an earlier
call or step has rounded is the same for both. Which proposals are taken, which queries are matched and on which side of
a kink a number lies can differ between two runs that only round otherwise, and does; here it cannot.

Shapes: N images, Q queries, H heads, L levels, P points.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ddetr.core.model import attention
from ddetr.ops import reference
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

IMAGES = 2  # of a batch: the specification is slow, and images have nothing to do with each other
KINK_PIXELS = 1e-4  # float32 places a point within 1e-5 pixels
NAMES = ("output", "gradient of value", "gradient of offsets", "gradient of logits")

Shapes = Sequence[tuple[int, int]]


def compare(shapes: Shapes, arguments: list[Tensor], results: list[Tensor], gradient: Tensor) -> dict[str, Any]:
    """L2 distances of the op, and of the specification in float32, from the specification in float64, and its L2 norm;
    "compared" is the share of points whose gradient counts.

    arguments: value, reference points, offsets, logits. results: the op's, as in NAMES. gradient: of the output.
    """
    exact = specified(shapes, [argument.double() for argument in arguments], gradient.double())
    in_float32 = specified(shapes, arguments, gradient)
    # The gradient of an offset jumps at pixel centres, so that rounding decides which one it is.
    smooth = off_kinks(shapes, *(argument.double() for argument in arguments[1:3]))
    comparison = {}
    for name, truth, *found in zip(NAMES, exact, results, in_float32, strict=True):
        where = smooth if name == "gradient of offsets" else torch.ones(())
        op, float32 = ((result.double() - truth).mul(where).norm().item() for result in found)
        comparison[name] = {"op": op, "float32": float32, "size": truth.mul(where).norm().item()}
    return comparison | {"compared": smooth.mean().item()}


def specified(shapes: Shapes, arguments: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """What the specification makes of `arguments`, as in NAMES."""
    value, reference_points, offsets, logits = (argument.detach().clone() for argument in arguments)
    leaves = [leaf.requires_grad_() for leaf in (value, offsets, logits)]
    with torch.enable_grad():
        output = reference.fused_deform_attn(value, shapes, reference_points, offsets, logits)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def off_kinks(shapes: Shapes, reference_points: Tensor, offsets: Tensor) -> Tensor:
    """(N, Q, H, L, P, 1): 1 for points that keep clear of pixel centres in both directions, 0 for others."""
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]  # (L, 1, 2)
    around = reference_points[:, :, None, :, None]
    scale = around[..., 2:] * 0.5 / offsets.shape[4] if around.shape[-1] == 4 else 1 / sizes
    pixels = (around[..., :2] + offsets * scale) * sizes - 0.5
    return ((pixels - pixels.round()).abs() > KINK_PIXELS).all(-1, keepdim=True).double()


if __name__ == "__main__":
    fused, comparisons = attention.fused_deform_attn, []

    def compared(value: Tensor, shapes: Shapes, *points: Tensor) -> Tensor:
        output = fused(value, shapes, *points)
        reference_points, offsets, logits = points
        assert not reference_points.requires_grad  # else its gradient would have to be compared as well

        def look(gradients: Sequence[Tensor | None]) -> None:
            of_output, *of_arguments = (gradient[:IMAGES] for gradient in gradients if gradient is not None)
            arguments = [argument.detach()[:IMAGES] for argument in (value, *points)]
            comparisons.append(compare(shapes, arguments, [output.detach()[:IMAGES], *of_arguments], of_output))

        register_multi_grad_hook([output, value, offsets, logits], look)  # calls when all four are known
        return output

    attention.fused_deform_attn = compared
    from ddetr.launch.cli import main

    try:
        main()
    finally:
        Path(os.environ["COMPARISONS"]).write_text(json.dumps(comparisons))
