"""Tensors of more than 2^31 elements: no index may be kept in 32 bits."""

from pathlib import Path

import pytest
import torch
from ddetr.ops import deform_attn, fused_deform_attn

pytestmark = pytest.mark.slow


def _need_gibibytes(needed: int) -> None:
    memory = Path("/proc/meminfo")
    if not memory.exists():
        pytest.skip("cannot tell how much memory is free")
    available = int(memory.read_text().split("MemAvailable:")[1].split()[0]) / 2**20
    if available < needed:
        pytest.skip(f"needs {needed} GiB of memory, {available:.0f} GiB are free")


def test_values_beyond_two_billion() -> None:
    """The last pixels of a map of 2^31 + 262 144 numbers, forward and backward."""
    _need_gibibytes(19)
    height, width, channels = 8193, 4096, 64
    value = torch.zeros(1, height * width, 1, channels)
    assert value.numel() > 2**31
    corner = [(height - 2) * width + width - 2, (height - 1) * width - 1, height * width - 2, height * width - 1]
    for number, row in enumerate(corner):
        value[0, row] = number + 1
    value.requires_grad_()
    # Halfway between the last two columns, a quarter of the way from the last line but one to the last.
    place = torch.tensor([(width - 1) / width, (height - 1.25) / height], dtype=torch.float64)
    locations = place.float().view(1, 1, 1, 1, 1, 2)
    output = deform_attn(value, [(height, width)], locations, torch.ones(1, 1, 1, 1, 1))
    # float32 places the point to within 2^-11 of a pixel.
    torch.testing.assert_close(output, torch.full((1, 1, channels), 2.0), rtol=0, atol=2e-3)
    output.backward(torch.ones_like(output))
    assert value.grad is not None
    shares = value.grad[0, corner, 0, 0]
    torch.testing.assert_close(shares, torch.tensor([0.375, 0.375, 0.125, 0.125]), rtol=0, atol=1e-3)
    assert value.grad[0, : corner[0]].count_nonzero() == 0


def test_points_beyond_two_billion() -> None:
    """The last query of 2^31 + 64 coordinates."""
    _need_gibibytes(12)
    queries, points = 2**25 + 1, 32
    offsets = torch.zeros(1, queries, 1, 1, points, 2, dtype=torch.float16)
    assert offsets.numel() > 2**31
    logits = torch.zeros(1, queries, 1, points, dtype=torch.float16)
    references = torch.full((1, queries, 1, 2), 0.25, dtype=torch.float16)
    value = torch.tensor([1.0, 3.0]).half().view(1, 2, 1, 1)
    offsets[0, -1, ..., 0] = 1.0  # from the first pixel, whose centre is at 0.25, to the second
    output = fused_deform_attn(value, [(1, 2)], references, offsets, logits)
    # A quarter of the way out of the map in y.
    assert output[0, -1].item() == 0.75 * 3
    assert (output[0, :-1] == 0.75).all()
