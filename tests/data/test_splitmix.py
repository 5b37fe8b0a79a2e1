"""Random numbers that belong to samples and steps: the published generator's, and the same for ever."""

import numpy as np
from ddetr.data.splitmix import random_numbers, step_seed
from scipy.stats import chisquare


def test_random_numbers_belong_to_seed_epoch_and_sample():
    keys = np.array([0, 1, 2**40])
    draws = {tuple(row) for seed in range(3) for epoch in range(3) for row in random_numbers(seed, epoch, keys, 4)}
    assert len(draws) == 27
    np.testing.assert_array_equal(random_numbers(1, 2, keys[::-1], 4), random_numbers(1, 2, keys, 4)[::-1])


def test_random_numbers_are_those_of_splitmix64():
    """The first outputs of the published generator, started with 0."""
    published = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64)
    np.testing.assert_array_equal(random_numbers(0, 0, np.array([0]), 3)[0], (published >> np.uint64(11)) * 2.0**-53)


def test_random_numbers_are_uniform_and_independent():
    """Of neighbouring samples too: a chi-squared test on each number, and on pairs of them."""
    numbers = random_numbers(7, 1, np.arange(20000), 8)
    for column in range(8):
        assert chisquare(np.bincount((numbers[:, column] * 20).astype(int), minlength=20)).pvalue > 1e-4
        next_sample = np.roll(numbers[:, column], 1)
        pairs = (numbers[:, column] * 10).astype(int) * 10 + (next_sample * 10).astype(int)
        assert chisquare(np.bincount(pairs, minlength=100)).pvalue > 1e-4
    correlation = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / 20000**0.5


def test_seeds_of_steps_are_those_of_every_release() -> None:
    """The losses of a run depend on them by dropout."""
    assert step_seed(0, 0, 0) == 0
    assert step_seed(42, 0, 0) == 42 * 0x9E3779B97F4A7C15 % 2**63
    assert step_seed(42, 999, 3) == 0x6509906BDD080622
    assert len({step_seed(seed, step, rank) for seed in range(4) for step in range(200) for rank in range(8)}) == 6400
