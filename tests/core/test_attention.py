"""Ordinary attention against nn.MultiheadAttention, and the dropout of a CPU.

Shapes: 2 images, Q queries, S tokens, C = 32 channels, 4 heads.
"""

import pytest
import torch
from ddetr.core.model.attention import Attention
from ddetr.core.model.dropout import Dropout
from torch import Tensor, nn

HIDDEN_DIM, HEADS = 32, 4


def _pair(dropout: float) -> tuple[Attention, nn.MultiheadAttention]:
    torch.manual_seed(1)
    ours = Attention(HIDDEN_DIM, HEADS, dropout)
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(HIDDEN_DIM, HEADS, batch_first=True)
    return ours, theirs


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    query, key, value = torch.randn(2, 7, HIDDEN_DIM), torch.randn(2, 11, HIDDEN_DIM), torch.randn(2, 11, HIDDEN_DIM)
    padding_mask = torch.zeros(2, 11, dtype=torch.bool)
    padding_mask[1, 6:] = True
    return query, key, value, padding_mask


def test_parameters_are_those_of_torch() -> None:
    """In name, order and initial value: checkpoints and optimizer states depend on it."""
    ours, theirs = _pair(0.1)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_attends_as_torch_does(padded: bool) -> None:
    ours, theirs = _pair(0.0)
    *inputs, padding_mask = _inputs()
    mask = padding_mask if padded else None
    results = []
    for module, call in ((ours, {"padding_mask": mask}), (theirs, {"key_padding_mask": mask, "need_weights": False})):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = module(*leaves, **call)
        output = output if isinstance(output, Tensor) else output[0]
        output.square().sum().backward()
        results.append([output, *(x.grad for x in leaves), *(p.grad for p in module.parameters())])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_drops_attention_weights_in_training() -> None:
    """What goes into the dropout are torch's weights; what comes out weighs the values."""
    ours, theirs = _pair(0.3)
    query, key, value, padding_mask = _inputs()
    seen: list[Tensor] = []
    ours.dropout.register_forward_hook(lambda module, inputs, output: seen.extend((*inputs, output)))
    output = ours(query, key, value, padding_mask)
    weights, dropped = seen
    _, expected = theirs(query, key, value, key_padding_mask=padding_mask, average_attn_weights=False)
    torch.testing.assert_close(weights, expected)
    projected = (value @ ours.in_proj_weight[-HIDDEN_DIM:].T).view(2, 11, HEADS, -1)
    attended = torch.einsum("nhqs,nshd->nqhd", dropped, projected).flatten(-2)
    torch.testing.assert_close(output, ours.out_proj(attended))
    ours.eval()
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


@pytest.mark.parametrize("after_relu", [False, True])
def test_dropout_of_a_cpu(after_relu: bool) -> None:
    """As many zeros as asked for, the rest scaled, and the gradient of what was kept."""
    torch.manual_seed(3)
    dropout = Dropout(0.25)
    leaf = torch.randn(1000, 1003, requires_grad=True)
    x = leaf * 1
    output = dropout.after_relu(x) if after_relu else dropout(x)
    expected = leaf.detach().relu() if after_relu else leaf.detach()
    kept = output != 0
    torch.testing.assert_close(output[kept], expected[kept] / 0.75)
    candidates = (expected != 0).sum().item()
    deviation = (0.25 * 0.75 / candidates) ** 0.5
    assert abs(1 - kept.sum().item() / candidates - 0.25) < 5 * deviation
    gradient = torch.randn_like(leaf)
    output.backward(gradient)
    torch.testing.assert_close(leaf.grad, torch.where(kept, gradient / 0.75, 0.0))
    assert torch.equal(dropout.eval()(leaf), leaf)
