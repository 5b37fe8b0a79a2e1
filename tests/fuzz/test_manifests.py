"""What a checkpoint and its run say beside the weights: read rightly or refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.checkpoint.codec import TRAINING, Checkpoint
from ddetr.core.checkpoint.manifest import MANIFEST, read_manifest, verify
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.evaluation.result import EVALUATION
from ddetr.core.training.saving import prune
from ddetr.data.text import visible
from ddetr.launch.checkpoint import inspect
from hypothesis import strategies as st

from tests.fuzz.checkpoint_files import STEP
from tests.fuzz.strategies import DAMAGES, Damage, Effort, changed, damaged, listing, outcome, watched


def test_damage_of_a_checkpoint_is_found(effort: Effort, run_directory: Path) -> None:
    """Of each of its files but the manifest, which has no checksum of its own."""
    folder = run_directory / STEP
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS, TRAINING, MANIFEST)}
    assert verify(folder)["step"] == 20
    stored = Checkpoint.read(folder)
    assert [dict(stored.beside(slot)).keys() for slot in stored.slots] == [stored.trained.keys()] * 2

    def holds(name: str, damage: Damage | None) -> None:
        for file, data in files.items():
            (folder / file).write_bytes(data)
        if damage is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damaged(files[name], damage))
        whole = damage is not None and damaged(files[name], damage) == files[name]
        before = listing(run_directory)
        with watched():
            checked = outcome(lambda: verify(folder), folder)
            outcome(lambda: Checkpoint.read(folder), folder, lines=True)
        assert listing(run_directory) == before
        if name != MANIFEST:
            assert (checked is not None) == whole

    effort(holds, st.sampled_from(sorted(files)), st.none() | DAMAGES)


MANIFEST_READERS: tuple[Callable[[Path], Any], ...] = (read_manifest, verify, Checkpoint.read)


def test_a_manifest_is_right_or_refused(effort: Effort, run_directory: Path) -> None:
    folder = run_directory / STEP
    good = (folder / MANIFEST).read_bytes()
    values = json.loads(good)

    def holds(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        before = listing(run_directory)
        with watched():
            read, _, found = (outcome(lambda reader=reader: reader(folder), folder) for reader in MANIFEST_READERS)
        assert listing(run_directory) == before
        if read is not None:
            assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in read["files"].items())
        if found is not None:
            position = found.position
            numbers = (position.step, position.epochs, position.step_in_epoch, position.steps_per_epoch)
            assert all(type(number) is int and 0 <= number < 2**63 for number in numbers)
            assert all(type(count) is int and 0 <= count < 2**63 for count in found.trained.values())

    texts = changed(values).map(lambda document: json.dumps(document).encode())
    effort(holds, texts | DAMAGES.map(lambda damage: damaged(good, damage)))


def test_a_checkpoint_of_a_stranger_is_described_or_refused(
    effort: Effort, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"{STEP}/{MANIFEST}", f"{STEP}/{EVALUATION}", "config.yaml"]
    files = {place: (run_directory / place).read_bytes() for place in places}
    as_json = {place: json.loads(data) for place, data in files.items() if place.endswith(".json")}

    def holds(place: str, data: bytes) -> None:
        for other, whole in files.items():
            (run_directory / other).write_bytes(data if other == place else whole)
        before = listing(run_directory)
        with watched():
            outcome(lambda: inspect(run_directory), run_directory, lines=True)
        assert listing(run_directory) == before
        printed = capsys.readouterr().out
        assert all(visible(line) == line for line in printed.split("\n"))
        assert "position  step 20, 2 epoch(s) done" in printed

    damage = st.tuples(st.sampled_from(places), DAMAGES).map(lambda p: (p[0], damaged(files[p[0]], p[1])))
    documents = [
        changed(document).map(lambda values, place=place: (place, json.dumps(values).encode()))
        for place, document in as_json.items()
    ]
    effort(lambda drawn: holds(*drawn), st.one_of(damage, *documents))


def test_scores_that_cannot_be_read_keep_their_checkpoint(effort: Effort, tmp_path: Path) -> None:
    """Of four checkpoints one is to stay: besides it the best, and each whose scores cannot be read."""
    run = tmp_path / "run" / "checkpoints"
    (tmp_path / "beside").write_text("beside")

    def holds(scores: list[bytes]) -> None:
        shutil.rmtree(run, ignore_errors=True)
        folders = [run / f"step_{number:08d}" for number in range(1, 5)]
        for folder, data in zip(folders, [*scores, b'{"AP": 0.5}'], strict=True):
            folder.mkdir(parents=True)
            (folder / EVALUATION).write_bytes(data)
        deleted = prune(folders, 1)
        assert [folder for folder in folders if not folder.exists()] == deleted
        assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "run"]
        numbers = [_average_precision(data) for data in scores]
        lost = [numbers[folders.index(folder)] for folder in deleted]
        assert all(number is not None and (number <= 0.5 or len(deleted) < 3) for number in lost)
        best = max([0.5, *(number for number in numbers if number is not None)])
        assert any(number == best for folder, number in zip(folders, [*numbers, 0.5], strict=True) if folder.exists())

    good = b'{"AP": 0.75, "AP50": 0.5}'
    score = changed(json.loads(good)).map(lambda values: json.dumps(values).encode())
    effort(holds, st.lists(score | DAMAGES.map(lambda damage: damaged(good, damage)), min_size=3, max_size=3))


def _average_precision(data: bytes) -> float | None:
    """A number that can be compared, -1 for none; None for what says neither."""
    try:
        value = json.loads(data)["AP"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if value is None or value != value:
        return -1
    return value if type(value) in (int, float) and abs(value) <= 1e18 else None


MANIFESTS = [
    {"step": 20.0},
    {"step": -1},
    {"epochs": None},
    {"epochs": 10**400},
    {"steps_per_epoch": True},
    {"order": 1},
    {"trained": {"a": "20"}},
    {"trained": {"a": 20}},
    {"slots": "exp_avg"},
    {"slots": [1]},
    {"slots": ["exp_avg", "momentum"]},
    {"loss_scale": {"cur_scale": "text"}},
    {"model": 1},
    {"model": "other"},
    {"model": "average"},
    {"version": "1"},
    {"version": 0},
    {"version": 3},
    {"files": {"a\nb": {"bytes": 1}}},
    {"files": {"x" * 5000: {"bytes": 1}}},
    {"files": {"\ud800": {"bytes": 1}}},
    {"files": {WEIGHTS: [1]}},
    {"files": {}},
]


@pytest.mark.parametrize("change", MANIFESTS, ids=lambda change: ascii(change)[:40])
def test_a_manifest_of_wrong_types_is_one_line(change: dict[str, Any], run_directory: Path) -> None:
    folder = run_directory / STEP
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, **change}))
    assert outcome(lambda: Checkpoint.read(folder), folder) is None
    with pytest.raises(ValueError, match=r"checkpoint\.json|safetensors has no (a|momentum/\S+)"):
        Checkpoint.read(folder)


@pytest.mark.parametrize("text", ['{"AP": false}', '{"AP": "0.1"}', '{"AP": 1' + "0" * 400 + "}", '{"AP": Infinity}'])
def test_scores_that_are_no_numbers_keep_their_checkpoint(text: str, tmp_path: Path) -> None:
    folders = [tmp_path / f"step_{number:08d}" for number in (1, 2, 3)]
    for folder, score in zip(folders, (text, '{"AP": 0.5}', '{"AP": 0.25}'), strict=True):
        folder.mkdir()
        (folder / EVALUATION).write_text(score)
    assert prune(folders, 1) == []


@pytest.mark.parametrize("value", ["1" + "0" * 400, '"0.1"', "[0.1]", "true"])
def test_scores_that_are_no_numbers_are_said(
    value: str, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_directory / STEP / EVALUATION
    file.write_text(re.sub(r'"AP50": [0-9.]+', f'"AP50": {value}', file.read_text()))
    inspect(run_directory)
    assert "evaluation.json cannot be read (AP50 is " in capsys.readouterr().out
