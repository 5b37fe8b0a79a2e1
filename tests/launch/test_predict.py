"""`ddetr predict`: the JSON and the drawn images, on real files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ddetr.launch.drawing import DrawnBox, colour, draw_boxes
from ddetr.launch.evaluate import evaluate
from ddetr.launch.explain import explain
from ddetr.launch.predict import predict
from PIL import Image

from tests.data.test_images import jpeg

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def images(run_directory: Path) -> Path:
    return run_directory.parent / "coco/images"


def test_predictions_are_those_of_the_evaluation(run_directory: Path, images: Path, tmp_path: Path) -> None:
    evaluate(run_directory, [], output=tmp_path / "eval")
    truth = json.loads((tmp_path / "eval/ground_truth.json").read_text())
    file_names = {image["id"]: image["file_name"] for image in truth["images"]}
    expected: dict[str, list[dict]] = {}
    for row in json.loads((tmp_path / "eval/detections.json").read_text()):
        expected.setdefault(file_names[row["image_id"]], []).append(row)

    json_file = predict(run_directory, [images], tmp_path / "out", ["eval.score_threshold=0.6"])
    content = json.loads(json_file.read_text())
    assert content["step"] == 20
    names = {category["id"]: category["name"] for category in truth["categories"]}
    assert {Path(entry["file"]).name for entry in content["images"]} == set(expected)
    for entry in content["images"]:
        with Image.open(entry["file"]) as image:
            assert (entry["width"], entry["height"]) == image.size
        with Image.open(tmp_path / "out" / entry["drawn"]) as drawn:
            assert max(drawn.size) >= 800, "small images are enlarged"
        rows = expected[Path(entry["file"]).name]
        assert len(entry["detections"]) == len(rows) == 30
        assert [d["score"] for d in entry["detections"]] == pytest.approx([r["score"] for r in rows], abs=1e-5)
        for got, row in zip(entry["detections"], rows, strict=True):
            assert got["name"] == names[got["category_id"]]
            if got["category_id"] == row["category_id"]:  # near ties may swap
                x, y, w, h = row["bbox"]
                assert got["box_xyxy"] == pytest.approx([x, y, x + w, y + h], abs=0.05)


def test_real_photographs_of_every_kind(
    make_run: Callable[..., Path], run_directory: Path, coco_free: Path, tmp_path: Path
) -> None:
    shards = run_directory.parent / "shards"
    run = make_run(tmp_path / "run", shards, (1,), "data.validation_short_side=64", "data.long_side=96")
    photograph = Image.open(sorted((coco_free / "images").iterdir())[0])
    for name, converted in {
        "gray.jpg": photograph.convert("L"),
        "cmyk.jpg": photograph.convert("CMYK"),
        "palette.png": photograph.convert("P"),
        "wide.png": photograph.resize((1500, 90)),
    }.items():
        converted.save(tmp_path / name)
    files = [tmp_path / name for name in ("gray.jpg", "cmyk.jpg", "palette.png", "wide.png")]
    content = json.loads(predict(run, files, tmp_path / "out", []).read_text())
    assert [entry["drawn"] for entry in content["images"]] == [
        "gray_detections.jpg", "cmyk_detections.jpg", "palette_detections.png", "wide_detections.png"
    ]  # fmt: skip


def test_equal_names_from_two_folders_do_not_collide(run_directory: Path, images: Path, tmp_path: Path) -> None:
    source = sorted(images.iterdir())[0]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / source.name).write_bytes(source.read_bytes())
    content = json.loads(predict(run_directory, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", []).read_text())
    assert len({entry["drawn"] for entry in content["images"]}) == 2


def test_bad_images_are_named_and_the_others_done(run_directory: Path, images: Path, tmp_path: Path) -> None:
    good = sorted(images.iterdir())[0]
    cut, text = tmp_path / "cut.jpg", tmp_path / "text.png"
    cut.write_bytes(good.read_bytes()[:500])
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"2 of 3 image\(s\) could not be read:\n.*cut\.jpg.*\n.*text\.png"):
        predict(run_directory, [cut, good, text], tmp_path / "out", [])
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["file"] for entry in content["images"]] == [str(good)]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg: no such image"):
        predict(run_directory, [good, tmp_path / "nowhere.jpg"], tmp_path / "untouched", [])
    assert not (tmp_path / "untouched").exists()


def test_what_states_too_much_or_is_no_file_is_named_and_hangs_nothing(
    run_directory: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match=r"in: no image files in this folder \(.*\.jpg"):
        predict(run_directory, [tmp_path / "in"], tmp_path / "out", [])
    (tmp_path / "in/bomb.jpg").write_bytes(jpeg(65500, 65500))
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/whole.jpg").write_bytes(sorted(images.iterdir())[0].read_bytes())
    told = r"2 of 3 image\(s\) .*\n.*bomb\.jpg: .* more than data.most_pixels=.*\n.*pipe\.jpg: not an ordinary file"
    with pytest.raises(ValueError, match=told):
        predict(run_directory, [tmp_path / "in"], tmp_path / "out", [])
    with pytest.raises(ValueError, match=r"whole\.jpg: .* more than data.most_pixels=1000 allows"):
        predict(run_directory, [tmp_path / "in/whole.jpg"], tmp_path / "out", ["data.most_pixels=1000"])
    with pytest.raises(ValueError, match=r"bomb\.jpg: .* more than data.most_pixels"):
        explain(run_directory, tmp_path / "in/bomb.jpg", tmp_path / "why.png")


def test_boxes_are_drawn_where_they_are_in_their_colour() -> None:
    image = Image.new("RGB", (1000, 500), "gray")
    drawn = np.asarray(draw_boxes(image, [DrawnBox((200, 100, 600, 400), "thing 0.50", 4)]))
    assert drawn.shape == (500, 1000, 3)
    for y, x in ((102, 500), (399, 300), (250, 202), (250, 598)):
        assert tuple(drawn[y, x]) == colour(4)
    assert tuple(drawn[250, 400]) == tuple(drawn[450, 900]) == (128, 128, 128)
    outside = np.asarray(draw_boxes(image, [DrawnBox((-50, -50, 2000, 2000), "thing", 4)]))
    assert tuple(outside[498, 500]) == tuple(outside[250, 998]) == colour(4), "a box beyond the border stays visible"


def test_no_name_hides_a_small_box() -> None:
    image = Image.new("RGB", (1000, 500), "gray")
    small, large = DrawnBox((230, 85, 242, 94), "", 1), DrawnBox((200, 100, 600, 400), "a name over the other", 4)
    drawn = np.asarray(draw_boxes(image, [small, large]))
    assert tuple(drawn[80, 420]) == colour(4), "the name lies there"
    assert {tuple(drawn[y, x]) for y, x in ((85, 236), (94, 236), (90, 230), (90, 242))} == {colour(1)}


def test_neighbouring_labels_have_different_colours() -> None:
    colours = np.array([colour(label) for label in range(12)], dtype=float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distance[~np.eye(12, dtype=bool)].min() > 40
