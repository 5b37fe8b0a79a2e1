"""The procedural set: reproducible, valid, and what it promises to contain."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from ddetr.data.doctor import check_coco
from ddetr.data.synthetic import SHAPES, Shape, draw_image, draw_set


@pytest.mark.integration
def test_equal_arguments_give_equal_bytes_for_any_workers(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        draw_set(tmp_path / name, images=40, size=64, classes=4, seed=3, workers=workers)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 41
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.integration
def test_the_set_is_valid_and_varied(tmp_path):
    path = draw_set(tmp_path, images=300, size=64, classes=3, seed=0, workers=1)
    assert not [finding for finding in check_coco(path, tmp_path / "images") if finding.severity == "error"]
    coco = json.loads(path.read_text())
    assert [category["id"] for category in coco["categories"]] == [1, 23, 56]
    single = [a for a in coco["annotations"] if not a["iscrowd"]]
    assert min(Counter(a["category_id"] for a in single).values()) > 0.25 * len(single)
    assert 3 <= sum(a["iscrowd"] for a in coco["annotations"]) <= 30
    per_image = Counter(Counter(a["image_id"] for a in single).values())
    assert set(per_image) == {1, 2, 3, 4, 5}
    assert 3 <= 300 - sum(per_image.values()) <= 30  # empty ones
    sides = np.array([max(a["bbox"][2:]) for a in single]) / 64
    assert (sides < 0.125).sum() > 10
    assert (sides > 0.3).sum() > 50


def test_boxes_fit_what_was_drawn():
    """Discs, whose outline is known: a lone whole one fills pi / 4 of a square box, in a colour unlike its corners'."""
    lone = 0
    for number in range(60):
        pixels, annotations = draw_image(128, 1, seed=1, number=number)
        for annotation in annotations:
            left, top, w, h = (int(value) for value in annotation["bbox"])
            assert min(left, top) >= 0
            assert max(left + w, top + h) <= 128
        if len(annotations) != 1 or annotation["iscrowd"] or min(left, top, 128 - left - w, 128 - top - h) == 0:
            continue
        lone += 1
        assert abs(w - h) <= 1
        assert annotation["area"] == pytest.approx(np.pi / 4 * w * h, rel=0.12)
        box = pixels[top : top + h, left : left + w].astype(float)
        edge = max(1, w // 10)
        corners = [box[:edge, :edge], box[:edge, -edge:], box[-edge:, :edge], box[-edge:, -edge:]]
        corner_colour = np.mean([corner.mean((0, 1)) for corner in corners], axis=0)
        assert np.linalg.norm(box[h // 4 : -h // 4, w // 4 : -w // 4].mean((0, 1)) - corner_colour) > 25
    assert lone >= 4


def test_seeds_and_images_differ():
    images = {draw_image(64, 3, seed, number)[0].tobytes() for seed in range(3) for number in range(3)}
    assert len(images) == 9


def test_another_set_is_not_overwritten(tmp_path):
    arguments = {"images": 3, "size": 32, "classes": 2, "workers": 1}
    path = draw_set(tmp_path, seed=0, **arguments)
    before = path.stat().st_mtime_ns
    assert draw_set(tmp_path, seed=0, **arguments).stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="another set"):
        draw_set(tmp_path, seed=1, **arguments)


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"images": []}'])
def test_a_json_of_somebody_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"another set; choose another folder$"):
        draw_set(tmp_path, images=3, size=32, classes=2, seed=0, workers=1)
    assert (tmp_path / "annotations.json").read_text() == content


def test_images_of_somebody_else_are_not_overwritten(tmp_path):
    arguments = {"images": 3, "size": 32, "classes": 2, "seed": 0, "workers": 1}
    drawn = [path.name for path in sorted((draw_set(tmp_path / "drawn", **arguments).parent / "images").iterdir())]
    photograph = tmp_path / "mine/images" / drawn[1]
    photograph.parent.mkdir(parents=True)
    photograph.write_bytes(b"a photograph")
    with pytest.raises(FileExistsError, match=f"{drawn[1]}: an image that would be overwritten; choose another"):
        draw_set(tmp_path / "mine", **arguments)
    assert photograph.read_bytes() == b"a photograph"
    photograph.unlink()
    draw_set(tmp_path / "mine", **arguments)  # as after an interruption: the first image is there
    assert sorted(path.name for path in photograph.parent.iterdir()) == drawn


@pytest.mark.parametrize(("name", "value"), [("images", 0), ("size", 8), ("classes", 99), ("seed", -1)])
def test_arguments_out_of_range_are_named(tmp_path, name, value):
    arguments = {"images": 1, "size": 32, "classes": 1, "seed": 0, name: value}
    with pytest.raises(ValueError, match=rf"^{name} must .*{value}"):
        draw_set(tmp_path, **arguments)


AREAS = {  # by the formulas of each, of corners or sides as they are drawn
    "disc": math.pi,
    "triangle": 3 / 2 * math.sin(2 * math.pi / 3),
    "cross": 2 * 1.84 * 0.6 - 0.6**2,
    "ring": math.pi * (1 - 0.56**2),
    "star": 5 * 0.45 * math.sin(math.pi / 5),
    "square": 2.0,
    "crescent": 1.5295,  # a unit disc without its lens with one of 0.8 at a distance of 0.5
    "hexagon": 6 / 2 * math.sin(math.pi / 3),
    "frame": 1.4**2 - 0.84**2,
    "bar": 1.92 * 0.52,
}


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_the_inside_of_an_outline_is_where_the_distance_is_negative(shape: Shape) -> None:
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 601), np.linspace(-1.5, 1.5, 601))
    inside = shape.distance(x, y) < 0
    assert inside.sum() * 0.005**2 == pytest.approx(AREAS[shape.name], rel=0.02)
    assert max(np.abs(x[inside]).max(), np.abs(y[inside]).max()) <= 1
