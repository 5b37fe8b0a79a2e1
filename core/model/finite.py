"""Infinities and NaN: the first module of a forward pass that made one, the first tensor that holds one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...data.text import visible


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """A context in which a forward pass of `model` puts the first module with such an output into the list.

    A module's inner modules finish before it, so the innermost one is named. Every output is read on the host: for a
    forward pass that is known to go wrong, not for every step.
    """
    found: list[str] = []

    def hook(name: str):
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if not found and not _is_finite(output):
                found.append(f"{name} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(output: object) -> bool:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def finite_or_poison(loss: Tensor) -> Tensor:
    """Return `loss`; if it is not finite, its gradients are NaN.

    The all-reduce carries them to all ranks, so all ranks skip the step.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def check_finite(weights: Mapping[str, Tensor], file: Path) -> None:
    """Raise ValueError that names the first tensor of a file with an infinity or NaN."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and (bad := tensor.numel() - int(tensor.isfinite().sum())):
            raise ValueError(
                f"{file}: {visible(name)} has {bad} of {tensor.numel()} values that are infinite or not a number; what "
                f"it was trained in had diverged. Take an earlier checkpoint"
            )
