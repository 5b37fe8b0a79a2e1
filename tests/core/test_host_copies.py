"""The training step waits for the device once, for the matching costs."""

from collections.abc import Callable

import pytest
import torch
from ddetr.core.config import load
from ddetr.core.model import matcher
from ddetr.core.model.criterion import criterion
from ddetr.core.model.detector import build
from ddetr.core.model.finite import finite_or_poison
from ddetr.core.training.optimizer import adamw
from ddetr.data.batch import Sample, collate, normalised
from torch.profiler import ProfilerActivity, profile

VARIANTS = {
    "plain": ["model.box_refine=false", "model.two_stage=false"],
    "two_stage": [],
    "detr": [
        *("model.box_refine=false", "model.two_stage=false", "model.levels=1"),
        *("model.architecture=detr", "model.classification=softmax"),
    ],
}
# What must know a value on the host, or how many there are, before the host can go on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "item"}


def waits_of(step: Callable[[], None]) -> list[str]:
    """Seen by the profiler, and so in the backward pass too; an index by a mask counts as nonzero."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return [event.name for event in profiled.events() or () if event.name.removeprefix("aten::") in WAITS]


def step_of(variant: str, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Everything up to the gradients, and what updates the weights."""
    config = load("tiny", ["model.hidden_dim=64", "model.dropout=0.1", *VARIANTS[variant]])
    torch.manual_seed(0)
    model = build(config.model).to(device).train()
    optimizer = adamw(model, config.optim)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.6, 0.2, 0.1], [0.7, 0.2, 0.1, 0.1]])
    samples = [
        Sample(torch.randint(256, (3, 64, 80), dtype=torch.uint8), boxes, torch.tensor([0, 1, 2]), 1, (64, 80)),
        Sample(torch.randint(256, (3, 96, 64), dtype=torch.uint8), boxes[:0], torch.tensor([]).long(), 2, (96, 64)),
    ]
    batch = collate(samples).batch()
    objects = torch.tensor(3.0, device=device)

    def gradients() -> None:
        moved = batch.to(torch.device(device))
        predictions = model(normalised(moved.images, moved.padding_mask), moved.padding_mask)
        losses = criterion(predictions, moved, config.optim, objects)
        finite_or_poison(losses.weighted(config.optim).sum()).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return gradients, update


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_copy_and_no_other_wait(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, _ = step_of(variant, "cpu")  # AdamW on a CPU reads its counters, which are on the host
    copies: list[torch.Size] = []

    class Counted(matcher.HostCopy):
        def __init__(self, source: torch.Tensor) -> None:
            copies.append(source.shape)
            super().__init__(source)

    monkeypatch.setattr(matcher, "HostCopy", Counted)
    assert waits_of(gradients) == []
    assert len(copies) == 1


def test_the_counter_sees_what_waits() -> None:
    values = torch.tensor([[1.0, -1.0]], requires_grad=True)

    def waiting() -> None:
        values.sum().item()
        values[values > 0]
        values.prod(-1).sum().backward()

    assert {"aten::_local_scalar_dense", "aten::nonzero"} <= set(waits_of(waiting))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_synchronizes_but_the_one_event(variant: str) -> None:
    gradients, update = step_of(variant, "cuda")
    for _ in range(2):  # what is done once is done
        gradients()
        update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients()
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
