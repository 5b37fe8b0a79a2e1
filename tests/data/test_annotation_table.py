"""Every row of the table of annotations: read, checked and packed."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from ddetr.data.doctor import check_set
from ddetr.data.findings import FIXES
from ddetr.data.formats import read_sets
from ddetr.data.index import ShardReader
from ddetr.data.sets import CocoSet
from ddetr.data.shards import pack_set

from tests.data.annotation_table import CASES
from tests.data.annotation_table.case import Case


def laid_out(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def read(case: Case, folder: Path) -> CocoSet:
    images = None if case.images is None else folder / case.images
    reading = replace(case.reading, classes=folder / case.classes) if case.classes else case.reading
    (coco,) = read_sets(folder / case.path, images, reading).values()
    return coco


def boxes_of(categories: dict[int, str], annotations: list[dict]) -> list[tuple]:
    return [(categories[row["category_id"]] + "*" * row["iscrowd"], *row["bbox"]) for row in annotations]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_set_means_what_it_means_or_is_a_finding(case: Case, tmp_path: Path) -> None:
    folder, output = tmp_path / "set", tmp_path / "shards"
    laid_out(case, folder)
    before = sorted(tmp_path.rglob("*"))
    if case.message and not case.findings:
        with pytest.raises((ValueError, FileNotFoundError), match=case.message) as refusal:
            read(case, folder)
        assert all(line.isprintable() for line in str(refusal.value).splitlines())
        assert str(folder) in str(refusal.value)
        return
    if "categories" in case.message:
        with pytest.raises(ValueError, match=case.message):
            read(case, folder)
        return
    coco = read(case, folder)
    findings = check_set(coco, workers=1)
    assert Counter(finding.kind for finding in findings) == dict(case.findings), findings
    assert all(finding.kind in FIXES and finding.where and finding.what for finding in findings)
    errors = {finding.kind for finding in findings if finding.severity == "error"}
    if case.drop_degenerate:
        errors -= {"degenerate box"}
    names = dict(zip(coco.categories.ids, coco.categories.names, strict=True))
    read_boxes = {image.file_name: boxes_of(names, image.annotations) for image in coco.images}
    for image, boxes in case.boxes.items():
        assert [name for name, *_ in read_boxes[image]] == [name for name, *_ in boxes]
        for (_, *found), (_, *expected) in zip(read_boxes[image], boxes, strict=True):
            assert found == pytest.approx(expected, abs=1e-9)
    if errors or case.message:
        with pytest.raises(ValueError, match=case.message or "|".join(map(re.escape, errors))):
            pack_set(coco, output, workers=1, drop_degenerate=case.drop_degenerate)
        assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, output]))
        return
    packed = pack_set(coco, output, workers=1, drop_degenerate=case.drop_degenerate)
    said = Counter(finding.kind for finding in packed.warnings)
    assert said == Counter(
        finding.kind for finding in findings if finding.kind not in ("duplicate content", "degenerate box")
    )
    reader = ShardReader(packed.index)
    entries = [reader.annotations(0, row) for row in range(packed.index.num_samples)]
    assert {entry["file_name"]: boxes_of(names, entry["annotations"]) for entry in entries} == read_boxes
    reader.close()
