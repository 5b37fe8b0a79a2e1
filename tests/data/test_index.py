"""An index.json of a server or a stranger: refused as a whole, in one line, before anything is done with it."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddetr.data import layout
from ddetr.data.doctor import check_shards
from ddetr.data.index import ShardIndex
from ddetr.data.layout import INDEX_NAME

Change = Callable[[dict[str, Any]], object]


def first(index: dict[str, Any]) -> dict[str, Any]:
    return index["shards"][0]


def sample(index: dict[str, Any]) -> dict[str, Any]:
    return first(index)["samples"][1]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NAMES = [
    *("../shard.tar", "/tmp/shard.tar", "a/b.tar", "a\\b.tar", "..", ".", ".tar", "", "shard.zip", "shard.tar\n"),
    *(
        "a\0.tar",
        "a\x1b[31m.tar",
        "\u202e.tar",
        "\ud800.tar",
        "a" * 300 + ".tar",
        "-rf.tar",
        "$(id).tar",
        "a'b.tar",
        "~.tar",
    ),
    *(7, None, True, ["a.tar"]),
]
DIGESTS = ["../../outside", "/tmp/outside", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "", 0, None, "٣" * 64]
COUNTS = [
    -1,
    10**15,
    10**18,
    2**63,
    10**30,
    -(10**30),
    1.0,
    1e300,
    float("nan"),
    float("inf"),
    True,
    None,
    "1",
    [1],
    {},
]
SHARD_BYTES = [*(value for value in COUNTS if value not in (10**15, 10**18)), 0, 100]

CHANGES: list[tuple[str, Change]] = [
    *((f"name {v!r:.20}", lambda i, v=v: first(i).update(name=v)) for v in NAMES),
    *((f"sha256 {v!r:.20}", lambda i, v=v: first(i).update(sha256=v)) for v in DIGESTS),
    *((f"fingerprint {v!r:.20}", lambda i, v=v: first(i).update(fingerprint=v)) for v in DIGESTS),
    *((f"bytes {v!r:.20}", lambda i, v=v: first(i).update(bytes=v)) for v in SHARD_BYTES),
    *(
        (f"{name} {v!r:.20}", lambda i, v=v, name=name: sample(i).update({name: v}))
        for name in layout.SAMPLE_LIMITS
        for v in COUNTS
        if not (name == "image_id" and v in (10**15, 10**18))
    ),
    *((f"no {name}", lambda i, name=name: sample(i).pop(name)) for name in layout.SAMPLE_LIMITS),
    ("height 0", lambda i: sample(i).update(height=0)),
    ("width 0", lambda i: sample(i).update(width=0)),
    ("a sample twice as far", lambda i: sample(i).update(image_offset=first(i)["bytes"] - 10)),
    ("members far apart", lambda i: (first(i).update(bytes=10**10), sample(i).update(annotations_offset=10**9))),
    ("a name twice", lambda i: i["shards"].append(first(i))),
    ("no shards", lambda i: i["shards"].clear()),
    ("no samples", lambda i: [shard["samples"].clear() for shard in i["shards"]]),
    ("no categories", lambda i: i["categories"].clear()),
    ("a category without name", lambda i: i["categories"][0].pop("name")),
    ("a category's name is a list", lambda i: i["categories"][0].update(name=["a"])),
    ("a category's id is true", lambda i: i["categories"][0].update(id=True)),
    ("a category's id is huge", lambda i: i["categories"][0].update(id=10**30)),
    ("a category twice", lambda i: i["categories"].append(i["categories"][0])),
    ("source holds brackets", lambda i: i["source"].update(images=nested(500))),
    *(
        (f"{name} is {v!r:.10}", lambda i, v=v, name=name: i.update({name: v}))
        for name in ("version", "shards", "categories", "source")
        for v in (None, 1.0, True, "text", [1], {"a": nested(3)}, nested(400), 10**30)
    ),
    *((f"no {name}", lambda i, name=name: i.pop(name)) for name in ("version", "shards", "categories", "source")),
    ("samples are numbers", lambda i: first(i).update(samples=[1, 2])),
    ("samples are an object", lambda i: first(i).update(samples={"a": 1})),
    ("shards are numbers", lambda i: i.update(shards=[1, "a"])),
]
TEXTS = {
    "nested": b"[" * 200_000,
    "nested and closed": b'{"version":1,"shards":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"version":' + b"9" * 10_000 + b"}",
    "no json": b"\x1b[31mhello",
    "no text": b"\xff\xfe\xfd",
    "empty": b"",
    "a list": b"[1]",
    "a number": b"1",
    "half": b'{"version":1,',
}


@pytest.fixture(scope="module")
def index_json(synthetic_shards: Path) -> str:
    return (synthetic_shards / INDEX_NAME).read_text()


def changed(text: str, change: Change) -> bytes:
    values = json.loads(text)
    change(values)
    return json.dumps(values).encode()


def assert_refused(folder: Path, data: bytes, name: str = "") -> None:
    with pytest.raises(ValueError, match=r"index.json: not a usable index \(.*\); copy the set again") as error:
        ShardIndex.parse(data, folder, folder)
    told = str(error.value)
    assert told.isprintable(), name
    assert len(told) < 1000, name
    assert "delete" not in told


def test_what_no_index_can_hold_is_refused(index_json, tmp_path):
    assert ShardIndex.parse(index_json.encode(), tmp_path, tmp_path).num_samples == 24
    assert changed(index_json, lambda i: None) != index_json.encode()  # json writes it otherwise, so a change is one
    for name, change in CHANGES:
        assert_refused(tmp_path, changed(index_json, change), name)
    for name, data in TEXTS.items():
        assert_refused(tmp_path, data, name)


MDS = {"column_encodings": ["jpeg", "json"], "column_names": ["image", "boxes"], "column_sizes": [None, None]}
MDS |= {"compression": None, "format": "mds", "hashes": [], "samples": 7158, "size_limit": 67108864, "version": 2}
MDS |= {"raw_data": {"basename": "shard.00000.mds", "bytes": 41225853, "hashes": {}}, "zip_data": None}
WIDS = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "train"}
WIDS |= {"shardlist": [{"url": "shard-000000.tar", "nsamples": 100, "filesize": 4096}]}
CHUNK = {"chunk_bytes": 64000000, "chunk_size": 250, "dim": None, "filename": "chunk-0-0.bin"}
LIT = {
    "chunk_bytes": 64000000,
    "chunk_size": None,
    "compression": None,
    "data_format": ["jpeg", "str"],
    "encryption": None,
}


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ({"shards": [MDS], "version": 2}, "MosaicML Streaming"),
        ({"version": 2, "shards": [{**MDS, "format": "json", "columns": {"id": "int"}}]}, "MosaicML Streaming"),
        (WIDS, "WebDataset (wids)"),
        ({"chunks": [CHUNK], "config": LIT, "updated_at": "1715000000"}, "LitData"),
        ({"images": [], "annotations": [], "categories": []}, "a COCO json"),
    ],
)
def test_an_index_of_another_program_is_called_by_its_name(theirs, name, tmp_path, synthetic_shards):
    data = json.dumps(theirs).encode()
    (tmp_path / INDEX_NAME).write_bytes(data)
    for read in (ShardIndex.load, check_shards, lambda folder: ShardIndex.parse(data, "https://host/set", folder)):
        with pytest.raises(ValueError, match=r"index\.json: ") as error:
            read(tmp_path)
        told = str(error.value)
        assert name in told
        assert "into a new folder: `ddetr data pack COCO_JSON IMAGES NEW_FOLDER`" in told
        assert "usable" not in told, "there is nothing wrong with it"
        assert "delete" not in told
        assert "copy" not in told
    assert (tmp_path / INDEX_NAME).read_bytes() == data


def test_a_local_index_is_believed_no_more_than_a_servers(synthetic_shards, index_json, tmp_path):
    folder = Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))
    (folder / INDEX_NAME).write_bytes(changed(index_json, lambda i: first(i).update(name="../shard-000000.tar")))
    for read in (ShardIndex.load, check_shards):
        with pytest.raises(ValueError, match=r"index.json: not a usable index \(a shard is called '../shard"):
            read(folder)
    os.truncate(folder / INDEX_NAME, layout.MOST_INDEX_BYTES + 1)
    with pytest.raises(ValueError, match=rf"index.json: the file has more than {1 << 30} bytes"):
        ShardIndex.load(folder)


@pytest.mark.parametrize("filling", [b"[],", b'{"a":1},', b"1,", '"\U0001f600",'.encode()])
def test_a_text_that_would_fill_the_memory_is_refused_unread(tmp_path, filling):
    begin = time.monotonic()
    text = b'{"version":1,"shards":[' + filling * (layout.LARGE_INDEX_BYTES // len(filling)) + b"1]}"
    with pytest.raises(ValueError, match="bytes, which do not describe samples"):
        ShardIndex.parse(text, tmp_path, tmp_path)
    assert time.monotonic() - begin < 20


def test_the_shortest_samples_are_not_taken_for_a_text_that_fills_the_memory():
    row = {"key": "000000000000", **{name: least for name, (least, _) in layout.SAMPLE_LIMITS.items()}}
    text = json.dumps(row, separators=(",", ":")).encode() + b","
    layout.check_density(text * (layout.LARGE_INDEX_BYTES // len(text) + 1))


def test_many_categories_of_one_id_are_refused_soon(index_json, tmp_path):
    begin = time.monotonic()
    many = [{"id": number // 2, "name": "a"} for number in range(200_000)]
    assert_refused(tmp_path, changed(index_json, lambda i: i.update(categories=many)))
    assert time.monotonic() - begin < 30


def test_rows_are_what_the_index_says(index_json, tmp_path):
    index = ShardIndex.parse(index_json.encode(), tmp_path, tmp_path)
    for shard, values in zip(index.shards, json.loads(index_json)["shards"], strict=True):
        for name in layout.SAMPLE_LIMITS:
            assert np.array_equal(shard.samples[name], [row[name] for row in values["samples"]])
