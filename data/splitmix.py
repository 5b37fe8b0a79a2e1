"""Counter-based random numbers: functions of (seed, epoch, sample) or (seed, step, rank), in any process at any time.

SplitMix64 (Steele, Lea and Flood, 2014) has a random access: its i-th number is a hash of i.
"""

import numpy as np

_INCREMENT = 0x9E3779B97F4A7C15  # of the counter that is hashed: 2^64 over the golden ratio
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of the hash


def random_numbers(seed: int, epoch: int, keys: np.ndarray, count: int) -> np.ndarray:
    """(n, count) float64 in [0, 1) that belong to each of the keys (n,) in an epoch."""
    stream = _mixed(_mixed(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    place = keys.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    return (_mixed(stream + place * np.uint64(_INCREMENT)) >> np.uint64(11)) * 2.0**-53


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed in [0, 2^63) for a generator that does its own hashing: neighbouring steps and ranks are far apart."""
    return (seed * _INCREMENT + step * _FACTORS[0] + rank * _FACTORS[1]) % 2**63


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_FACTORS[0])
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return bits ^ (bits >> np.uint64(31))
