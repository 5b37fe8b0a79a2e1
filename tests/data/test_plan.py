"""The order of an epoch, and how ranks and micro-batches divide it."""

from itertools import islice

import numpy as np
import pytest
from ddetr.data.plan import StepPlan, epoch_order, random_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

SHARDS = (7, 1, 30, 12)


def plan(batch_size=8, accumulation=1, rank=0, world_size=1, shard_sizes=SHARDS, seed=3, window=10) -> StepPlan:
    return StepPlan(shard_sizes, batch_size, accumulation, rank, world_size, seed, window)


def epoch_of(plan: StepPlan, epoch: int, first_step: int = 0) -> list[list[int]]:
    """One rank's micro-batches from a step to the end of an epoch."""
    count = (plan.steps_per_epoch - first_step) * plan.accumulation
    return [samples for _, samples in islice(plan.micro_batches(epoch, first_step), count)]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    window=st.integers(1, 100),
)
def test_an_epoch_is_a_permutation_of_all_samples(sizes, seed, epoch, window):
    order = epoch_order(sizes, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_the_order_never_changes_between_releases():
    """A resumed run continues the very order it began, so these numbers are part of the checkpoint's meaning."""
    assert epoch_order([3, 4, 2], seed=1, epoch=0, window=4).tolist() == [7, 0, 1, 8, 4, 2, 5, 3, 6]
    assert epoch_order([3, 4, 2], seed=1, epoch=1, window=4).tolist() == [7, 2, 0, 1, 5, 4, 8, 3, 6]
    np.testing.assert_allclose(random_numbers(1, 2, 3).random(2), [0.7392729637493114, 0.1727219477163251], rtol=1e-15)


def test_seed_and_epoch_change_the_order():
    orders = {tuple(epoch_order(SHARDS, seed=s, epoch=e, window=50)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_samples_move_at_most_a_window():
    sizes, window = [50] * 40, 100
    order = epoch_order(sizes, seed=0, epoch=0, window=window)
    for start in range(0, len(order), window):
        assert len({sample // 50 for sample in order[start : start + window]}) == window // 50
    wide = epoch_order(sizes, seed=0, epoch=0, window=2000)
    moved = np.abs(wide - np.arange(2000)).mean()
    assert abs(moved - 2000 / 3) < 60  # a uniform permutation of n moves its elements n / 3 on average


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_and_micro_batches_only_divide_the_global_batch(world_size, accumulation):
    batch_size = 16
    order = epoch_order(SHARDS, seed=3, epoch=5, window=10).tolist()
    ranks = [epoch_of(plan(batch_size, accumulation, r, world_size), 5) for r in range(world_size)]
    size = batch_size // (accumulation * world_size)
    assert {len(rank) for rank in ranks} == {len(order) // batch_size * accumulation}
    joined = [sample for micro in zip(*ranks, strict=True) for part in micro for sample in part]
    assert all(len(part) == size for rank in ranks for part in rank)
    assert joined == order[: len(order) // batch_size * batch_size]


def test_a_resumed_plan_is_the_rest_of_the_whole_one():
    whole = epoch_of(plan(accumulation=2), 4)
    assert epoch_of(plan(accumulation=2), 4, first_step=3) == whole[6:]


def test_the_plan_goes_on_into_the_next_epoch():
    both = [(epoch, samples) for epoch, samples in islice(plan().micro_batches(0, 5), 3)]
    assert both == [(0, epoch_of(plan(), 0)[5]), (1, epoch_of(plan(), 1)[0]), (1, epoch_of(plan(), 1)[1])]


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"train.batch_size must be a multiple of .* = 4 \* 2, got 12"):
        plan(batch_size=12, accumulation=2, world_size=4)
    with pytest.raises(ValueError, match=r"train.batch_size must be at most .* 50, got 51"):
        plan(batch_size=51)


def test_random_numbers_belong_to_seed_epoch_and_sample():
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in (0, 1, 2**40)]
    draws = {tuple(random_numbers(*key).random(4)) for key in keys}
    assert len(draws) == len(keys)
    assert random_numbers(1, 2, 3).random() == random_numbers(1, 2, 3).random()
