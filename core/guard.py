"""Where a number that is not finite came from: the first module of the forward pass that made one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Within it, a forward pass of `model` leaves the name of the first such module in the list.

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
    """`loss`, made so that an infinite one has gradients that are not numbers, which every rank sees and skips."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
