"""What `ddetr eval` writes of where a detector fails, and what the report shows of it."""

import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ddetr.core.config import dump, load
from ddetr.core.evaluation import analysis as analyses
from ddetr.core.evaluation.failures import failures
from ddetr.data.categories import Categories
from ddetr.data.index import ShardIndex
from ddetr.data.truth import GroundTruth
from ddetr.launch.console import Terminal
from ddetr.launch.evaluate import evaluate
from ddetr.launch.failures import CLASSES, CONFUSIONS, WORST, as_csv, pictures, write
from ddetr.launch.page import PICTURE_BYTES
from ddetr.launch.report import report
from PIL import Image

from tests.core.detection_sets import CATEGORIES, drawn
from tests.core.test_failures import many_classes, of
from tests.launch.test_evaluate import rewritten_weights
from tests.launch.test_report import Page, page_of

MOST_PAGE_BYTES = 3 << 20  # of a report with 1,203 classes and every picture


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text(), newline="")))


@pytest.mark.integration
def test_eval_writes_and_says_where_it_fails(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory, run)
    metrics = evaluate(run, [])
    folder = run / "eval/step_00000020"
    value = analyses.read(folder)
    assert value.step == 20
    assert value.images == 18
    assert (value.ap, value.ap50) == pytest.approx((metrics["AP"], metrics["AP50"]), abs=1e-6)
    assert [group.ap for group in value.by_size] == pytest.approx([metrics["AP_small"], metrics["AP_medium"]], abs=1e-6)
    found = rows_of(folder / CLASSES)
    assert [(int(row["id"]), row["name"]) for row in found] == [(row.id, row.name) for row in value.classes]
    assert [float(row["AP"]) for row in found] == [row.ap for row in value.classes]
    assert list(found[0]) == ["id", "name", "objects", "AP", "AP50", "recall", "threshold", "F1"]
    confusions = [(row["truth"], row["found"], int(row["count"])) for row in rows_of(folder / CONFUSIONS)]
    assert confusions == [(pair.truth, pair.found, pair.count) for pair in value.confusions] != []
    for file in pictures(folder):
        with Image.open(file) as image:
            assert image.width > 2 * image.height * 0.8, "two halves side by side"
    said = capsys.readouterr().out
    for kind in value.errors:
        assert re.search(rf"{kind.name} +│ +{kind.count} │ +{kind.confident} │ +{kind.gain:.4f}", said), said
    assert f"calibration error: {value.calibration_error:.3f}" in said
    assert f"lowest AP: {value.classes[0].name} {value.classes[0].ap:.3f}" in said

    (run / "config.yaml").write_text(dump(load("tiny")))
    page = page_of(run)
    assert "Where it fails" in page.text
    assert page.tags.count("img") == 12
    # A model without a score leaves nothing that says where an earlier one failed.
    (folder / "evaluation.json").unlink()
    weights = run / "checkpoints/step_00000020"
    shutil.rmtree(run / "checkpoints/step_00000010")
    rewritten_weights(weights, lambda name: 1e38 if "linear1.weight" in name else None)
    with pytest.raises(FloatingPointError):
        evaluate(run, [])
    assert not (folder / analyses.FILE_NAME).exists()
    assert not list((folder / WORST).iterdir())


@pytest.mark.integration
def test_on_ray_and_of_all_checkpoints_it_is_the_same(run_directory: Path, tmp_path: Path) -> None:
    evaluate(run_directory, [], output=tmp_path / "here")
    evaluate(run_directory, [], ray_address="local", output=tmp_path / "all", all_checkpoints=True)
    for name in (analyses.FILE_NAME, CLASSES, CONFUSIONS, f"{WORST}/01.jpg"):
        assert (tmp_path / "all/step_00000020" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert (tmp_path / "all/step_00000010" / analyses.FILE_NAME).exists()


@pytest.mark.integration
def test_an_image_that_is_damaged_meanwhile_has_no_picture(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[ShardIndex, GroundTruth, np.ndarray]] = []
    evaluate(run_directory, [], output=tmp_path / "good", use=lambda *found: seen.append(found))
    shards = tmp_path / "shards"
    shutil.copytree(run_directory.parent / "shards", shards)
    index = ShardIndex.load(shards)
    _, truth, detections = seen[0]
    found = failures(truth, detections, index.categories)
    assert found is not None
    worst = found.analysis.worst[0]
    (sample,) = np.flatnonzero(index.samples["image_id"] == worst.id)
    shard, row = index.locate(int(sample))
    with index.shards[shard].path.open("r+b") as file:
        file.seek(int(index.shards[shard].samples[row]["image_offset"]) + 40)
        file.write(b"damaged!")
    write(Terminal(), tmp_path, index, found, most_pixels=1 << 24)
    assert f"no picture of image {worst.id}: " in capsys.readouterr().out
    assert [file.exists() for file in pictures(tmp_path)] == [False] + [True] * 11


def test_names_in_a_table_stay_in_their_cells_and_are_no_formulas() -> None:
    names = ['a,b"c', "two\nlines", "=1+1", "-2", "@SUM(A1)", " =x", "ü", "'", "tab\there", "\x1b[31m"]
    text = as_csv(("name", "number"), [(name, 1.5) for name in names] + [("none", None)]).decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [len(row) for row in rows] == [2] * (len(names) + 2)
    assert [row[0] for row in rows[1:-1]] == [
        'a,b"c',
        "two\\nlines",
        "'=1+1",
        "'-2",
        "'@SUM(A1)",
        "' =x",
        "ü",
        "'",
        "tab\\there",
        "\\x1b[31m",
    ]
    assert rows[1][1] == "1.5"
    assert rows[-1] == ["none", ""]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with nothing but its settings."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(load("tiny")))
    return folder


def noise(file: Path, seed: int, size: tuple[int, int]) -> None:
    """The picture that compresses worst."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, quality=95)


def test_the_page_stays_small_with_1203_classes_and_every_picture(run: Path) -> None:
    folder = run / "eval/step_00000100"
    folder.mkdir(parents=True)
    value = many_classes()
    assert len(value.worst) == analyses.MOST_WORST
    analyses.write(folder, value)
    for number, file in enumerate(pictures(folder)):
        noise(file, number, (520, 1046))
        noise(run / f"eval/other_{number:02d}.jpg", number, (720, 720))
    page = page_of(run)
    assert (run / "report.html").stat().st_size < MOST_PAGE_BYTES
    assert page.tags.count("img") == 24
    assert all(len(address) < PICTURE_BYTES * 4 / 3 + 100 for address in page.addresses)
    assert page.tags.count("svg") > 1203
    assert page.text.count(value.classes[0].name) >= 1
    assert "<0>" not in (run / "report.html").read_text()


def test_the_page_shows_the_newest_analysis_by_its_numbers(run: Path) -> None:
    for step, seed in ((10, 1), (20, 2)):
        folder = run / f"eval/step_{step:08d}"
        folder.mkdir(parents=True)
        found = failures(*drawn(seed), CATEGORIES, step=step, shards="shards/val")
        assert found is not None
        analyses.write(folder, found.analysis)
    page = page_of(run)
    value = found.analysis
    assert any(text.startswith("Step 20: 25 images of shards/val, ") for text in page.text)
    row = value.classes[0]
    wanted = [row.name, str(row.objects), f"{100 * row.ap:.1f} %", f"{100 * row.ap50:.1f} %"]
    start = page.text.index("precision over recall") + 1
    assert page.text[start : start + 4] == wanted
    kind = max(value.errors, key=lambda kind: kind.gain)
    assert f"+{100 * kind.gain:.1f}" in page.text
    pair = value.confusions[0]
    assert page.after("of its objects", 3) == [pair.truth, pair.found, str(pair.count)]
    assert any(words.startswith("Precision over recall: IoU 0.50 from ") for words in page.alternatives)
    assert any(words.startswith("Right detections by score: ") for words in page.alternatives)


def test_names_of_strangers_are_text_in_the_page(run: Path) -> None:
    folder = run / "eval/step_00000010"
    folder.mkdir(parents=True)
    names = ("<script>alert(1)</script>", '"><img src=x>', "a\u202eb")
    found = failures(*drawn(1), Categories(CATEGORIES.ids, names), shards="<b>")
    assert found is not None
    analyses.write(folder, found.analysis)
    page = page_of(run)
    assert not {"script", "img", "b"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert "a\\u202eb" in page.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"version": 2}', "version 2, this release reads 1")],
)
def test_an_analysis_that_cannot_be_read_is_a_warning(run: Path, content: str, message: str) -> None:
    folder = run / "eval/step_00000010"
    folder.mkdir(parents=True)
    (folder / analyses.FILE_NAME).write_text(content)
    text = (report(run)).read_text()
    assert re.search(rf'<p class="warning">[^<]*{re.escape(message)}', text)
    assert "Settings" in Page(text).text


def test_analyses_and_pictures_behind_links_out_of_the_run_are_not_shown(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    analyses.write(elsewhere, of(*drawn(1)).analysis)
    noise(elsewhere / WORST / "01.jpg", 1, (50, 100))
    (run / "eval").mkdir()
    (run / "eval/step_00000010").symlink_to(elsewhere)
    assert "Where it fails" not in page_of(run).text
    (run / "eval/step_00000010").unlink()
    (run / "eval/step_00000010").mkdir()
    analyses.write(run / "eval/step_00000010", of(*drawn(1)).analysis)
    (run / "eval/step_00000010" / WORST).symlink_to(elsewhere / WORST)
    page = page_of(run)
    assert "Where it fails" in page.text
    assert "img" not in page.tags


@pytest.mark.integration
def test_pictures_are_not_written_through_a_link_in_a_run(run_directory: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(run_directory, run)
    (run / "eval/step_00000020").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "01.jpg").write_text("mine")
    (run / "eval/step_00000020" / WORST).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"worst is a link to .*elsewhere"):
        evaluate(run, [])
    assert (elsewhere / "01.jpg").read_text() == "mine"
