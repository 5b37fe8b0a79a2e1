"""Shards of strangers: annotations of any form and size, headers of a tar that lead nowhere."""

import io
import json
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from ddetr.data.config import DataConfig
from ddetr.data.doctor import check_shards
from ddetr.data.files import file_sha256
from ddetr.data.index import SampleError, ShardIndex, ShardReader, tar_members
from ddetr.data.layout import INDEX_NAME
from ddetr.data.statistics import read_objects
from ddetr.data.stream import TrainStream, evaluation_batches

from tests.data.test_index import TEXTS, nested
from tests.truth import coco_truth


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    values = {"remainder": "pad", "short_sides": (64,), "validation_short_side": 64, "long_side": 128, "workers": 0}
    return DataConfig(cache=str(tmp_path / "cache"), fetch_attempts=2, fetch_timeout_seconds=5, **values)


ENTRIES: list[tuple[str, Any]] = [
    ("a list", [1]),
    ("nothing", {}),
    ("a path as number", {"file_name": 1}),
    ("a huge id", {"image_id": 10**30}),
    ("another image", {"image_id": 5}),
    ("a huge side", {"height": 2**31 - 1}),
    ("no side", {"height": 0}),
    ("a side that is true", {"height": True}),
    ("another side", {"height": 95}),
    ("another number of annotations", {"annotations": []}),
    ("annotations as object", {"annotations": {"a": 1}}),
    ("annotations as numbers", {"annotations": [1]}),
    ("nested annotations", {"annotations": nested(500)}),
    *(
        (
            f"{name} {v!r:.20}",
            {"annotations": [{"id": 1, "bbox": [1, 1, 9, 9], "category_id": 1, "area": 81} | {name: v}]},
        )
        for name, values in {
            "id": (None, "1", 10**30, 1.5, True),
            "bbox": (
                None,
                [1, 1, 1],
                "1234",
                [1, 1, 9, "9"],
                [1, 1, 9, 10**400],
                [1, 1, 9, float("nan")],
                [[1], 1, 9, 9],
            ),
            "category_id": (None, "1", 7777, 10**30, True, [1]),
            "area": ("1", [], 10**400, float("inf")),
            "iscrowd": (None, "0", 2, 0.5),
        }.items()
        for v in values
    ),
]


def with_annotations(synthetic_shards: Path, folder: Path, text: bytes) -> tuple[Path, str]:
    """A copy whose first sample's annotations are these; the index describes them rightly. Also the sample's key."""
    shutil.copytree(synthetic_shards, folder)
    path = folder / "shard-000000.tar"
    old = ShardIndex.load(folder).shards[0]
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    members[1] = (members[1][0], text)
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    values = json.loads((folder / INDEX_NAME).read_text())
    places = tar_members(path)
    for row in values["shards"][0]["samples"]:
        members_of = dict(places[row["key"]])
        row["annotations_offset"], row["annotations_bytes"] = members_of.pop("json")
        ((row["image_offset"], row["image_bytes"]),) = members_of.values()
    values["shards"][0]["samples"][0]["annotations_crc32"] = zlib.crc32(text)
    values["shards"][0].update(bytes=path.stat().st_size, sha256=file_sha256(path))
    (folder / INDEX_NAME).write_text(json.dumps(values))
    return folder, old.key(0)


def test_annotations_of_a_stranger_are_a_sample_error_that_names_shard_and_key(synthetic_shards, config, tmp_path):
    good = ShardReader(ShardIndex.load(synthetic_shards)).annotations(0, 0)
    texts = [(name, json.dumps(good | v if isinstance(v, dict) and v else v).encode()) for name, v in ENTRIES]
    texts += [(f"text {name}", data) for name, data in TEXTS.items() if data]
    for number, (name, text) in enumerate(texts):
        folder, key = with_annotations(synthetic_shards, tmp_path / str(number), text)
        index = ShardIndex.load(folder)
        whole_way = number % 8 == 0 or "7777" in name
        with pytest.raises(SampleError, match=rf"shard-000000.tar: sample {key}: ") as error:
            ShardReader(index).sample(0, 0)
        assert str(error.value).isprintable(), name
        if whole_way:
            parts = list(evaluation_batches(index, [0], config, batch_size=4))
            assert [key in message for part in parts for message in part.bad_samples] == [True], name
            stream = TrainStream(index, config, batch_size=4, accumulation=1, rank=0, world_size=1, seed=1)
            bad = [message for (batch,) in stream.steps(0) for message in batch.bad_samples]
            stream.close()
            assert [key in message for message in bad] == [True], name
            findings = check_shards(folder, workers=1)
            assert any(key in finding.where for finding in findings), name
            assert {finding.kind for finding in findings} <= {"wrong bytes", "unknown category", "wrong size"}, name
        shutil.rmtree(folder)


def test_annotations_of_equal_ids_are_objects_of_their_own(synthetic_shards, tmp_path):
    good = ShardReader(ShardIndex.load(synthetic_shards)).annotations(0, 0)
    assert len(good["annotations"]) > 1
    equal = {**good, "annotations": [{**annotation, "id": 7} for annotation in good["annotations"]]}
    folder, _ = with_annotations(synthetic_shards, tmp_path / "set", json.dumps(equal).encode())
    annotations = coco_truth(ShardIndex.load(folder))["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    assert [a["bbox"] for a in annotations[: len(good["annotations"])]] == [a["bbox"] for a in good["annotations"]]


def test_statistics_name_the_sample_of_an_unknown_category(synthetic_shards, tmp_path):
    good = ShardReader(ShardIndex.load(synthetic_shards)).annotations(0, 0)
    good["annotations"] = [{"id": 1, "bbox": [1, 1, 9, 9], "category_id": 7777, "area": 81, "iscrowd": 0}]
    folder, key = with_annotations(synthetic_shards, tmp_path / "set", json.dumps(good).encode())
    with pytest.raises(SampleError, match=rf"sample {key}: category id 7777"):
        read_objects(ShardIndex.load(folder), workers=1)


@pytest.mark.parametrize("kind", ["endless", "extended", "huge", "negative"])
def test_headers_of_a_tar_that_lead_nowhere_are_an_error(tmp_path, kind):
    member = tarfile.TarInfo("000000000001.json")
    member.size = 10
    header = bytearray(member.tobuf())
    if kind == "extended":
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 4
        data = (long.tobuf() + b"abc".ljust(512, b"\0")) * 3000
    else:
        value = {"endless": -1024, "negative": -1, "huge": 2**60}[kind]
        header[124:136] = b"\x80" + value.to_bytes(11, "big") if value > 0 else value.to_bytes(12, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data = bytes(header) + bytes(1024)
    (tmp_path / "shard.tar").write_bytes(data * (2 if kind == "endless" else 1))
    with pytest.raises(tarfile.TarError):
        tar_members(tmp_path / "shard.tar")


def test_images_beyond_the_limit_are_bad_samples_that_name_the_setting(synthetic_shards, config):
    index, small = ShardIndex.load(synthetic_shards), config.model_copy(update={"most_pixels": 100})
    told = r"shard-000000.tar: sample \d{12}: the image states \d+ x \d+ pixels, more than data.most_pixels=100 allows"
    parts = list(evaluation_batches(index, [0], small, batch_size=4))
    messages = [message for part in parts for message in part.bad_samples]
    assert [bool(re.search(told, message)) for message in messages] == [True] * len(index.shards[0].samples)
    stream = TrainStream(index, small, batch_size=4, accumulation=1, rank=0, world_size=1, seed=1)
    bad = [message for (batch,) in stream.steps(0) for message in batch.bad_samples]
    stream.close()
    assert len(bad) == index.num_samples
    assert all("data.most_pixels=100" in message for message in bad)
