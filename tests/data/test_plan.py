"""The order of an epoch, and how ranks and micro-batches divide it."""

from itertools import islice

import numpy as np
import pytest
from ddetr.data.config import DataConfig
from ddetr.data.plan import NOTHING, StepPlan, epoch_order
from ddetr.data.splitmix import random_numbers
from ddetr.data.views import DRAWS, training_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

SHARDS = (7, 1, 30, 12)


def plan(
    batch_size=8, accumulation=1, rank=0, world_size=1, shard_sizes=SHARDS, seed=3, window=16, **options
) -> StepPlan:
    return StepPlan(shard_sizes, batch_size, accumulation, rank, world_size, seed, window, **options)


def sizes_of(epoch: int, samples: np.ndarray) -> np.ndarray:
    """Heights and widths between 100 and 400, others in each epoch."""
    return 100 + (random_numbers(0, epoch, samples, 2) * 300).astype(int)


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
    expected = [[0.19546674582895374, 0.6000403613355682], [0.19475595394389944, 0.01061913049945129]]
    np.testing.assert_allclose(random_numbers(1, 2, np.array([3, 2**40]), 2), expected, rtol=1e-15)


def test_seed_and_epoch_change_the_order():
    orders = {tuple(epoch_order(SHARDS, seed=s, epoch=e, window=50)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_samples_move_at_most_a_window():
    sizes, window = [50] * 40, 100
    order = epoch_order(sizes, seed=0, epoch=0, window=window)
    for start in range(0, len(order), window):
        assert len({sample // 50 for sample in order[start : start + window]}) == window // 50


def move_and_adjacency(orders: list[np.ndarray], shard_size: int) -> tuple[float, float]:
    """(how far a sample moves between two epochs, in shares of the set; share of neighbours from one shard)."""
    places = [np.argsort(order) for order in orders]
    moved = np.abs(places[0] - places[1]).mean() / len(orders[0])
    return float(moved), float((np.diff(orders[0] // shard_size) == 0).mean())


def test_windows_shuffle_about_as_well_as_a_full_permutation():
    """Neighbours from one shard are as rare as the shards of a window allow, and samples move as far as they can."""
    sizes, random = [50] * 200, np.random.default_rng(0)
    moved, adjacent = move_and_adjacency([random.permutation(10_000) for _ in range(2)], 50)
    assert moved == pytest.approx(1 / 3, abs=0.02)
    assert adjacent == pytest.approx(1 / 200, abs=0.003)
    for in_window in (10, 40, 200):
        orders = [epoch_order(sizes, seed=0, epoch=epoch, window=50 * in_window) for epoch in range(2)]
        moved, adjacent = move_and_adjacency(orders, 50)
        assert moved == pytest.approx(1 / 3, abs=0.04)
        assert adjacent == pytest.approx(1 / in_window, rel=0.2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("options", [{}, {"seen_sizes": sizes_of}, {"remainder": "pad", "seen_sizes": sizes_of}])
def test_ranks_and_micro_batches_only_divide_the_global_batch(world_size, accumulation, options):
    shards, batch_size = (70, 1, 300, 120), 48
    whole = list(plan(batch_size, shard_sizes=shards, window=150, **options).batches(5))
    ranks = [
        epoch_of(plan(batch_size, accumulation, r, world_size, shards, window=150, **options), 5)
        for r in range(world_size)
    ]
    size = batch_size // (accumulation * world_size)
    assert {len(rank) for rank in ranks} == {len(whole) * accumulation}
    assert all(len(part) == size for rank in ranks for part in rank)
    joined = [sample for micro in zip(*ranks, strict=True) for part in micro for sample in part]
    assert joined == np.concatenate(whole).tolist()


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch_size=st.integers(1, 60),
    window=st.integers(1, 100),
    seen=st.booleans(),
)
def test_padding_leaves_nothing_out(sizes, batch_size, window, seen):
    """Every sample once, and nothing but the last step is filled up."""
    options = {"remainder": "pad", "seen_sizes": sizes_of if seen else None}
    steps = list(plan(batch_size, shard_sizes=sizes, window=window, **options).batches(1))
    assert len(steps) == -(-sum(sizes) // batch_size)
    samples = np.concatenate(steps)
    assert sorted(samples[samples != NOTHING].tolist()) == list(range(sum(sizes)))
    assert (samples[: sum(sizes)] != NOTHING).all()


def test_what_is_dropped_is_no_matter_of_size():
    dropped = [
        size
        for epoch in range(200)
        for size in sizes_of(epoch, _left_out(plan(shard_sizes=(75,), window=75, seen_sizes=sizes_of), epoch)).prod(1)
    ]
    everything = sizes_of(0, np.arange(10000)).prod(1)
    assert len(dropped) == 200 * (75 % 8)
    assert abs(np.mean(dropped) - everything.mean()) < 4 * everything.std() / len(dropped) ** 0.5


def _left_out(plan: StepPlan, epoch: int) -> np.ndarray:
    return np.setdiff1d(np.arange(sum(plan.shard_sizes)), np.concatenate(list(plan.batches(epoch))))


def test_images_of_similar_size_meet():
    """Of COCO's sizes and with the published augmentation, at most a tenth of the pixels are padding."""
    heights_and_widths = np.array([(480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (640, 640), (333, 500)])

    def seen(epoch: int, samples: np.ndarray) -> np.ndarray:
        heights, widths = heights_and_widths[samples % len(heights_and_widths)].T
        return training_sizes(heights, widths, DataConfig(), random_numbers(0, epoch, samples, DRAWS))

    shares, slowest = [], []
    for seen_sizes in (None, seen):
        made = plan(32, shard_sizes=(4000,), window=8192, seen_sizes=seen_sizes)
        sizes = np.stack([seen(3, batch) for batch in made.batches(3)]).reshape(-1, 8, 4, 2)  # 8 ranks, 4 images each
        padded = sizes.max(2).prod(-1) * 4
        shares.append(1 - sizes.prod(-1).sum() / padded.sum())
        slowest.append(padded.max(1).mean() / padded.mean())
    assert shares[0] > 0.3
    assert shares[1] < 0.1
    assert slowest[1] < 1.2 < slowest[0]


def test_a_resumed_plan_is_the_rest_of_the_whole_one():
    whole = epoch_of(plan(accumulation=2), 4)
    assert epoch_of(plan(accumulation=2), 4, first_step=3) == whole[6:]


def test_the_plan_goes_on_into_the_next_epoch():
    both = [(epoch, samples) for epoch, samples in islice(plan().micro_batches(0, 5), 3)]
    assert both == [(0, epoch_of(plan(), 0)[5]), (1, epoch_of(plan(), 1)[0]), (1, epoch_of(plan(), 1)[1])]


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"train.batch_size must be a multiple of .* = 4 \* 2, got 12; nearest: 8 and 16$"
    ):
        plan(batch_size=12, accumulation=2, world_size=4)
    with pytest.raises(ValueError, match=r"train.batch_size must be at most .* 50, got 51; nearest: 50; or set data"):
        plan(batch_size=51)
