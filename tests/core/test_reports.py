"""Lines of a run's log."""

import logging
from dataclasses import replace

import pytest
from ddetr.core.config import Config
from ddetr.core.evaluation.result import Result
from ddetr.core.training.reports import EvaluationReport, Progress, StepReport
from ddetr.core.training.schedule import Schedule

LOSSES = {"total": 3.0, "class": 1.0, "l1": 1.5, "giou": 0.5}
STEP = StepReport(
    1, 0, ("class", "l1", "giou"), LOSSES, 1e-4, 2.0, 8, 0.5, 0.1, 0.4, False, 1 << 30, 1.0, 0.0, 0.0, None, (), ()
)
RESULT = Result({"AP": 0.25}, "AP", 24, 0, 1.5, 1e9, 1, 1, None, None)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_all_should_know_is_a_warning(quiet: bool, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(Config(), 0, Schedule.of(Config().train, 10, None), quiet)
    with caplog.at_level(logging.INFO, "ddetr"):
        progress.observe(replace(STEP, slow_ranks=("rank 1 on b\x1b[31m needs 2.00 s of a step",)))
        progress.observe(replace(STEP, skipped=True, not_finite="the loss"))
        progress.observe(EvaluationReport(1, 0, replace(RESULT, num_not_finite=3)))
        progress.observe(EvaluationReport(1, 0, RESULT))
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert bool(said) != quiet
    if not quiet:
        slow, skipped, without, scored = said
        assert slow == ("WARNING", r"rank 1 on b\x1b[31m needs 2.00 s of a step: all wait for it")
        assert skipped == ("WARNING", "step 1 skipped: the loss")
        assert without[0] == "ERROR"
        assert without[1].startswith("step 1: ")
        assert scored[1].startswith("evaluated step 1 on 24 images in 1.5 s: ")
