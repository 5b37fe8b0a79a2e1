"""How far a run has come."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    epochs: whole ones, all done. steps_per_epoch: 0 where that is not known. order: a fingerprint of which image comes
    when.
    """

    step: int
    epochs: int
    step_in_epoch: int
    steps_per_epoch: int
    order: str = ""
