"""The evaluation of a run in progress, without ranks and a model; with them: test_trainer.py."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ddetr.core.evaluation.result import Result
from ddetr.core.training import validation
from ddetr.data.sources import SourceError


def test_an_error_of_one_rank_is_raised_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this rank is well: the others would wait for it."""

    def unreachable(*of: Any) -> Any:
        raise SourceError("the server of the shards is gone")

    monkeypatch.setattr(validation, "load_detector", lambda *of, **more: None)
    monkeypatch.setattr(validation, "Count", lambda *of: None)
    monkeypatch.setattr(validation, "evaluate_shards", unreachable)
    told: list[Any] = []
    world: Any = SimpleNamespace(rank=0, size=2, device="cpu", gather=lambda mine, kind: told.extend(mine) or mine)
    watch: Any = SimpleNamespace(at=lambda *of: None, stop=lambda: False)
    index: Any = SimpleNamespace(shards=[None])
    with pytest.raises(SourceError, match="the server of the shards is gone"):
        validation.evaluate(tmp_path, None, index, world, watch, 7)  # type: ignore[arg-type]
    monkeypatch.setattr(validation, "evaluate_shards", lambda *of: iter(()))
    world.gather = lambda mine, kind: [*mine, *told]
    with pytest.raises(OSError, match="the server of the shards is gone"):
        validation.evaluate(tmp_path, None, index, world, watch, 7)  # type: ignore[arg-type]


def test_a_result_that_cannot_be_written_is_told_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = Result({"AP": 0.25}, "AP", 24, 0, 1.5, 1e9, 1, 1, None, None)

    def full(folder: Path, written: Result) -> None:
        raise OSError(28, "No space left on device", str(folder / "evaluation.json"))

    monkeypatch.setattr(validation, "load_detector", lambda *of, **more: None)
    monkeypatch.setattr(validation, "evaluate_shards", lambda *of: iter(()))
    monkeypatch.setattr(validation, "weights_digest", lambda file: "0" * 64)
    count = SimpleNamespace(merge=lambda others: None, result=lambda weights, began, by: found, bad_samples=["one"])
    monkeypatch.setattr(validation, "Count", lambda *of: count)
    monkeypatch.setattr(validation.result, "write", full)
    world: Any = SimpleNamespace(rank=0, size=1, device="cpu")
    world.gather, world.bytes_to_first = lambda mine, kind: mine, lambda mine: [mine]
    world.agree = lambda choose, kind: choose()
    watch: Any = SimpleNamespace(at=lambda *of: None, stop=lambda: False)
    index: Any = SimpleNamespace(shards=[None])
    with caplog.at_level(logging.ERROR, "ddetr"):
        told = validation.evaluate(tmp_path, None, index, world, watch, 7)  # type: ignore[arg-type]
    assert told == (found, ["one"])
    assert f"{tmp_path}: its evaluation is not recorded: [Errno 28] No space left on device" in caplog.text
