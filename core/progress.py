"""The progress of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """The progress of a run, as a checkpoint keeps it.

    step: optimizer steps done. epochs: whole epochs done. step_in_epoch: steps done of the epoch after them.
    steps_per_epoch: 0 if unknown. order: a fingerprint of the order of the images.
    """

    step: int
    epochs: int
    step_in_epoch: int
    steps_per_epoch: int
    order: str = ""
