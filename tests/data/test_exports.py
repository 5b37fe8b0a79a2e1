"""What annotation tools really export (tests/data/exports/README.md) is read as what was drawn there."""

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from ddetr.data.formats import read_sets
from ddetr.data.sets import CocoImage, CocoSet

from tests.data.export_cases import CASES, LABEL_STUDIO, Case
from tests.data.export_truth import CLASSES, MARKED, PICTURES, draw

EXPORTS = Path(__file__).parent / "exports"
EXPORTED_AT = "/srv/export"  # stands in data.yaml for the folder that the tool wrote into
SAME_PART = {"val": "valid", "default": ""}  # what a layout calls a part, and what the reader may call it


def placed(case: Case, tmp_path: Path, *, moved: bool = False) -> tuple[Path, Path]:
    """A copy of an export with its images: the root, and the root of the images."""
    root = tmp_path / "export"
    shutil.copytree(EXPORTS / case.folder, root)
    for file in () if moved else root.rglob("*.y*ml"):
        file.write_text(file.read_text().replace(EXPORTED_AT, str(root)))
    images = tmp_path / "photos" if case.elsewhere else root
    for name in case.pictures:
        draw(name, images / case.place(name))
    return root, images


def read(case: Case, tmp_path: Path, *, moved: bool = False) -> dict[str, CocoSet]:
    root, images = placed(case, tmp_path, moved=moved)
    sets = read_sets(root / case.below, images) if case.elsewhere else read_sets(root / case.below)
    return {SAME_PART.get(name, name): part for name, part in sets.items()}


def errors(sets: dict[str, CocoSet]) -> list[str]:
    return [row.kind for part in sets.values() for row in part.findings if row.severity == "error"]


def by_picture(case: Case, part: CocoSet) -> dict[str, CocoImage]:
    """The images by the picture that they show, found by the end of their path."""
    endings = {name: PurePosixPath(case.stored(name)).parts for name in case.pictures}
    found = {}
    for image in part.images:
        path = PurePosixPath(image.file_name).parts
        (name,) = [name for name, ending in endings.items() if path[-len(ending) :] == ending]
        assert name not in found
        found[name] = image
    return found


def objects(part: CocoSet, image: CocoImage) -> list[tuple[str, int, list[float]]]:
    """(class, crowd, xywh in pixels) of each object, by class and left side."""
    names = dict(zip(part.categories.ids, part.categories.names, strict=True))
    rows = [(names[row["category_id"]], row["iscrowd"], row["bbox"]) for row in image.annotations]
    return sorted(rows, key=lambda row: (row[0], row[2][0]))


def drawn(case: Case, name: str) -> list[tuple[str, int, Any]]:
    """What `objects` should give."""
    return [
        (class_name, int(case.marks and (name, class_name) == MARKED), pytest.approx(box, abs=case.tolerance, rel=0))
        for class_name, *box in sorted(PICTURES[name].objects)
    ]


def assert_as_drawn(case: Case, sets: dict[str, CocoSet]) -> None:
    of_part = {
        SAME_PART.get(part, part): {
            name for name in case.pictures if len(case.parts) == 1 or PICTURES[name].part == called
        }
        for part, called in zip(case.parts, ("train", "valid"), strict=False)
    }
    of_part |= {union: set(case.pictures) for union in case.unions if union in sets}
    assert set(sets) == set(of_part)
    for part_name, part in sets.items():
        images = by_picture(case, part)
        assert set(images) == of_part[part_name]
        for name, image in images.items():
            assert (image.width, image.height) == (PICTURES[name].width, PICTURES[name].height)
            assert objects(part, image) == drawn(case, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_export_is_read_as_what_was_drawn(case: Case, tmp_path: Path):
    sets = read(case, tmp_path)
    assert not errors(sets), [part.findings for part in sets.values()]
    assert_as_drawn(case, sets)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.parts) > 1 and not case.own_classes], ids=str)
def test_all_parts_of_an_export_have_the_same_categories(case: Case, tmp_path: Path):
    train, *others = [part.categories for part in read(case, tmp_path).values()]
    assert set(CLASSES) <= set(train.names)
    assert others
    assert all((part.ids, part.names) == (train.ids, train.names) for part in others)


@pytest.mark.parametrize(
    "case",
    [
        Case("datumaro-1.13.12/cvat"),  # CVAT's own xml, not VOC's
        Case("labelme-6.3.1/json", "{name}"),  # labelme's own json, not COCO's
        Case("globox-2.9.0/yolo_v5"),  # labels without names of classes
        Case("ultralytics-8.4.190/convert_coco", "images/{part}/{name}", ("train", "val")),  # likewise
    ],
    ids=str,
)
def test_what_is_no_whole_set_of_a_known_format_is_refused_by_name(case: Case, tmp_path: Path):
    root, _ = placed(case, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=str(root)):
        read_sets(root)


def test_an_annotation_that_pylabel_wrote_twice_is_an_error(tmp_path: Path):
    sets = read(Case("pylabel-0.1.55/coco", "{name}", elsewhere=True), tmp_path)
    assert errors(sets) == ["duplicate id"]


@pytest.mark.parametrize(
    "case",
    [
        Case("sahi-0.12.8/yolo", "{part}/{name}", ("train", "val")),  # data.yml says where the folder was
        # file_name leads two folders up, into the store of the server; the images are in images/
        Case("label-studio-sdk-2.1.2/COCO_WITH_IMAGES", names=LABEL_STUDIO),
    ],
    ids=str,
)
def test_a_path_of_the_machine_that_exported_is_an_error_or_is_understood(case: Case, tmp_path: Path):
    try:
        sets = read(case, tmp_path, moved=True)
    except (ValueError, FileNotFoundError) as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 - one of the two right ways
    else:
        if not errors(sets):
            assert_as_drawn(case, sets)
