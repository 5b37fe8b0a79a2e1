"""Limits on skipped steps and damaged images, after which a run ends: counts, and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """Counts and their limits. most_skipped: skipped steps in a row. most_bad: different damaged images."""

    most_skipped: int
    most_bad: float
    skipped: int = 0  # in a row
    bad: frozenset[str] = frozenset()

    def after(self, skipped: bool, bad_samples: Iterable[str]) -> "Limits":
        """The counts after one more step."""
        return replace(self, skipped=self.skipped + 1 if skipped else 0, bad=self.bad.union(bad_samples))

    @property
    def has_skipped_too_many(self) -> bool:
        return self.skipped >= self.most_skipped

    @property
    def has_too_many_bad(self) -> bool:
        return len(self.bad) > self.most_bad
