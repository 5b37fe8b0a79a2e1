"""Packing: the same bytes however it is done, nothing half-made, every fault named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset as wds
from ddetr.data.index import INDEX_NAME, ShardIndex, ShardReader
from ddetr.data.shards import pack
from ddetr.data.storage import LocalStorage
from ddetr.data.synthetic import draw_set

from tests.truth import coco_truth

SHARD_BYTES = 16 << 10


def pack_folder(coco: Path, output: Path, workers: int = 1, **options) -> ShardIndex:
    return pack(coco / "annotations.json", coco / "images", output, workers=workers, shard_bytes=SHARD_BYTES, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.integration
def test_bytes_do_not_depend_on_workers(coco_folder, tmp_path):
    one = pack_folder(coco_folder, tmp_path / "one", workers=1)
    pack_folder(coco_folder, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {INDEX_NAME, *(shard.name for shard in one.shards)}
    assert len(one.shards) >= 3
    sizes = [shard.bytes for shard in one.shards]
    largest_sample = max(path.stat().st_size for path in (coco_folder / "images").iterdir()) + 4096
    assert max(sizes) - min(sizes) <= 2 * largest_sample


def test_shards_are_ordinary_webdataset_tars_that_the_index_describes(coco_folder, tmp_path):
    index = pack_folder(coco_folder, tmp_path / "shards")
    coco = json.loads((coco_folder / "annotations.json").read_text())
    reader = ShardReader(index)
    seen = set()
    for number, shard in enumerate(index.shards):
        read = list(wds.WebDataset(str(shard.path), shardshuffle=False))
        assert [sample["__key__"] for sample in read] == [shard.key(row) for row in range(len(shard.samples))]
        for row, sample in enumerate(read):
            assert reader.image(number, row) == sample["jpg"]
            entry = json.loads(sample["json"])
            assert reader.annotations(number, row) == {**entry, "orientation": 1}
            assert sample["jpg"] == (coco_folder / "images" / entry["file_name"]).read_bytes()
            assert shard.samples[row]["num_boxes"] == len(entry["annotations"])
            seen.add(entry["image_id"])
    assert seen == {image["id"] for image in coco["images"]}
    assert index.categories.to_json() == coco["categories"]
    assert [index.locate(i) for i in range(index.num_samples)] == [
        (number, row) for number, shard in enumerate(index.shards) for row in range(len(shard.samples))
    ]


def test_the_reader_keeps_few_files_open(coco_folder, tmp_path, monkeypatch):
    index = pack_folder(coco_folder, tmp_path / "shards")
    monkeypatch.setattr(LocalStorage, "MOST_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(index)
    for number in [*range(len(index.shards))] * 2:
        reader.image(number, 0)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_ground_truth_is_the_json(coco_folder, tmp_path):
    index = pack_folder(coco_folder, tmp_path / "shards")
    coco = json.loads((coco_folder / "annotations.json").read_text())
    truth = coco_truth(index)

    def by_id(items):
        return sorted(items, key=lambda item: item["id"])

    assert by_id(truth["images"]) == by_id(coco["images"])
    assert by_id(truth["annotations"]) == by_id(coco["annotations"])
    parts = [coco_truth(index, [number]) for number in range(len(index.shards))]
    assert [a for part in parts for a in part["annotations"]] == truth["annotations"]


def test_ground_truth_has_no_annotation_0_which_pycocotools_takes_for_no_match(coco_folder, edit, tmp_path):
    def from_0(coco):
        for number, annotation in enumerate(coco["annotations"]):
            annotation["id"] = number

    before = coco_truth(pack_folder(coco_folder, tmp_path / "before"))["annotations"]
    edit(from_0)
    annotations = coco_truth(pack_folder(coco_folder, tmp_path / "shards"))["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(before) + 1))

    def contents(annotations):
        return sorted(({**annotation, "id": None} for annotation in annotations), key=json.dumps)

    assert contents(annotations) == contents(before)


def test_real_coco_fed_back_as_detections_has_perfect_precision(coco_free, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    index = pack(coco_free / "annotations_val.json", coco_free / "images", tmp_path / "shards", workers=1)
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in coco_truth(index)["annotations"]
    ]
    original = COCO(str(coco_free / "annotations_val.json"))
    evaluation = COCOeval(original, original.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    assert evaluation.stats[1] == pytest.approx(1.0)


@pytest.mark.integration
def test_a_killed_run_is_continued(tmp_path):
    """SIGKILL in the middle: no index, only whole shards; the next run keeps them and ends with the same bytes."""
    coco, output = tmp_path / "coco", tmp_path / "shards"
    draw_set(coco, images=300, size=96, classes=3, seed=1, workers=1)
    command = (
        "import sys; from pathlib import Path; from ddetr.data.shards import pack;"
        "coco, output = map(Path, sys.argv[1:]);"
        f"pack(coco / 'annotations.json', coco / 'images', output, workers=2, shard_bytes={SHARD_BYTES})"
    )
    process = subprocess.Popen([sys.executable, "-c", command, str(coco), str(output)])
    while len(list(output.glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # its workers end with it
    finished = {
        path.name: path.stat().st_mtime_ns for path in output.glob("*.tar") if path.with_suffix(".json").exists()
    }
    assert len(finished) >= 2
    assert not (output / INDEX_NAME).exists()
    with pytest.raises(FileNotFoundError, match=r"no index.json"):
        ShardIndex.load(output)
    index = pack_folder(coco, output)
    assert len(finished) < len(index.shards)
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    pack_folder(coco, tmp_path / "undisturbed")
    assert contents(output) == contents(tmp_path / "undisturbed")


def test_packing_again_makes_only_what_is_missing(coco_folder, tmp_path):
    output = tmp_path / "shards"
    index = pack_folder(coco_folder, output)
    before = contents(output)
    times = {shard.name: shard.path.stat().st_mtime_ns for shard in index.shards}
    index.shards[0].path.unlink()
    index.shards[1].path.write_bytes(index.shards[1].path.read_bytes()[:-600])
    pack_folder(coco_folder, output)
    assert contents(output) == before
    kept = {shard.name for shard in index.shards if shard.path.stat().st_mtime_ns == times[shard.name]}
    assert kept == set(times) - {index.shards[0].name, index.shards[1].name}


def test_shards_of_another_set_are_not_overwritten(coco_folder, edit, tmp_path):
    pack_folder(coco_folder, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    edit(lambda coco: coco["annotations"].pop())
    with pytest.raises(FileExistsError, match="already holds shards of other images"):
        pack_folder(coco_folder, tmp_path / "shards")
    assert contents(tmp_path / "shards") == before


def test_a_degenerate_box_is_refused_unless_dropped(coco_folder, edit, tmp_path):
    def flatten(coco):
        coco["annotations"][3]["bbox"][2] = 0.0

    edit(flatten)
    coco = json.loads((coco_folder / "annotations.json").read_text())
    bad = coco["annotations"][3]
    with pytest.raises(ValueError, match=r"nothing was packed") as refusal:
        pack_folder(coco_folder, tmp_path / "shards")
    assert f"annotation {bad['id']} of image {bad['image_id']}" in str(refusal.value)
    assert "--drop-degenerate" in str(refusal.value)
    assert not (tmp_path / "shards").exists()
    index = pack_folder(coco_folder, tmp_path / "shards", drop_degenerate=True)
    assert index.source["dropped_boxes"] == 1
    ids = {annotation["id"] for annotation in coco_truth(index)["annotations"]}
    assert ids == {annotation["id"] for annotation in coco["annotations"]} - {bad["id"]}


def test_missing_images_and_unknown_categories_are_listed(coco_folder, edit, tmp_path):
    (coco_folder / "images/000002.jpg").unlink()
    (coco_folder / "images/000007.jpg").unlink()
    edit(lambda coco: coco["annotations"][0].update(category_id=4))
    with pytest.raises(ValueError, match="nothing was packed, 3 error") as refusal:
        pack_folder(coco_folder, tmp_path / "shards")
    for part in ("000002.jpg", "000007.jpg", "category_id 4", "unknown category: 1", "missing image: 2"):
        assert part in str(refusal.value)
    assert not (tmp_path / "shards").exists()


@pytest.mark.integration
@pytest.mark.parametrize("workers", [1, 2])
def test_undecodable_images_leave_no_index(coco_folder, tmp_path, workers):
    path = coco_folder / "images/000003.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"image 4 \(000003.jpg\).*truncated"):
        pack_folder(coco_folder, tmp_path / "shards", workers=workers)
    assert not (tmp_path / "shards" / INDEX_NAME).exists()
    assert not list((tmp_path / "shards").glob(".*"))
    path.write_bytes(whole)
    assert pack_folder(coco_folder, tmp_path / "shards").num_samples == 20


def test_a_size_that_is_not_the_files_is_refused(coco_folder, edit, tmp_path):
    edit(lambda coco: coco["images"][2].update(height=70, width=64))
    with pytest.raises(ValueError, match=r"64 x 70 is stated, the file holds 64 x 64"):
        pack_folder(coco_folder, tmp_path / "shards")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no images"),
    ],
)
def test_what_is_no_coco_json_is_said_to_be_none(tmp_path, text, message):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "annotations.json", tmp_path, tmp_path / "shards", workers=1)
    with pytest.raises(FileNotFoundError, match="no such file"):
        pack(tmp_path / "none.json", tmp_path, tmp_path / "shards", workers=1)


def test_a_folder_that_does_not_fit_its_index_is_found_when_loaded(synthetic_shards, tmp_path):
    def broken_copy(name: str) -> Path:
        return Path(shutil.copytree(synthetic_shards, tmp_path / name))

    missing = broken_copy("missing")
    (missing / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001.tar is missing.*data pack"):
        ShardIndex.load(missing)
    cut = broken_copy("cut")
    os.truncate(cut / "shard-000000.tar", 5000)
    with pytest.raises(FileNotFoundError, match=r"shard-000000.tar has 5000 bytes instead of"):
        ShardIndex.load(cut)
    extra = broken_copy("extra")
    shutil.copy(extra / "shard-000000.tar", extra / "shard-000099.tar")
    with pytest.raises(FileNotFoundError, match=r"shard-000099.tar is not in the index"):
        ShardIndex.load(extra)
    newer = broken_copy("newer")
    (newer / INDEX_NAME).write_text((newer / INDEX_NAME).read_text().replace('"version":1', '"version":99'))
    with pytest.raises(ValueError, match="version 99"):
        ShardIndex.load(newer)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ShardIndex.load(tmp_path / "nowhere")


def test_shards_of_another_set_that_was_not_packed_to_its_end_are_kept(coco_folder, edit, tmp_path):
    output, image = tmp_path / "shards", coco_folder / "images/000004.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # found when it is decoded
    with pytest.raises(ValueError, match="are kept for the next try"):
        pack_folder(coco_folder, output)
    before = contents(output)
    assert before
    edit(lambda coco: coco.update(annotations=[{**row, "category_id": 1} for row in coco["annotations"]]))
    with pytest.raises(FileExistsError, match=r"shards of another set that was not packed to its end; choose another"):
        pack_folder(coco_folder, output)
    assert contents(output) == before


def test_what_cannot_be_packed_to_is_named(coco_folder, tmp_path):
    with pytest.raises(ValueError, match="shard_bytes must be positive, got 0"):
        pack(coco_folder / "annotations.json", coco_folder / "images", tmp_path / "new", workers=1, shard_bytes=0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file: not a folder; choose another place for the shards"):
        pack_folder(coco_folder, tmp_path / "file")


def test_what_stands_beside_another_shard_is_not_believed(coco_folder, tmp_path):
    index = pack_folder(coco_folder, tmp_path / "shards")
    first, second = index.shards[:2]
    (tmp_path / "shards" / INDEX_NAME).unlink()
    sidecar = first.path.with_suffix(".json")
    sidecar.write_text(json.dumps(second.to_json()))
    with pytest.raises(ValueError, match=rf"{sidecar}: not what .* notes beside a shard \(it is of {second.name}\)"):
        pack_folder(coco_folder, tmp_path / "shards")
