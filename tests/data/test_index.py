"""An index.json of a server or a stranger: refused as a whole, in one line, before anything is done with it."""

import gzip
import io
import json
import os
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddetr.data import layout
from ddetr.data.cache import FOLDER, open_shards
from ddetr.data.config import DataConfig
from ddetr.data.doctor import check_shards
from ddetr.data.index import SampleError, ShardIndex, ShardReader, file_sha256, tar_members
from ddetr.data.layout import INDEX_NAME
from ddetr.data.sources import SourceError
from ddetr.data.statistics import read_objects
from ddetr.data.stream import TrainStream, evaluation_batches

from tests.data.hostile_server import HostileServer, files, reply

Change = Callable[[dict[str, Any]], None]


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


def test_a_local_index_is_believed_no_more_than_a_servers(synthetic_shards, index_json, tmp_path):
    folder = Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))
    (folder / INDEX_NAME).write_bytes(changed(index_json, lambda i: first(i).update(name="../shard-000000.tar")))
    for read in (ShardIndex.load, check_shards):
        with pytest.raises(ValueError, match=r"index.json: not a usable index \(a shard is called '../shard"):
            read(folder)
    os.truncate(folder / INDEX_NAME, layout.MOST_INDEX_BYTES + 1)
    with pytest.raises(ValueError, match=rf"index.json: the file has more than {1 << 30} bytes"):
        ShardIndex.load(folder)


def test_many_categories_of_one_id_are_refused_soon(index_json, tmp_path):
    begin = time.monotonic()
    many = [{"id": number // 2, "name": "a"} for number in range(200_000)]
    assert_refused(tmp_path, changed(index_json, lambda i: i.update(categories=many)))
    assert time.monotonic() - begin < 30


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    values = {"remainder": "pad", "short_sides": (64,), "validation_short_side": 64, "long_side": 128, "workers": 0}
    return DataConfig(cache=str(tmp_path / "cache"), fetch_attempts=2, fetch_timeout_seconds=5, **values)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], HostileServer]]:
    servers: list[HostileServer] = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> HostileServer:
        servers.append(HostileServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("fetch", ["shards", "samples"])
def test_a_servers_bad_index_makes_nothing_be_asked_for_or_written(
    serve, synthetic_shards, index_json, config, tmp_path, fetch
):
    (tmp_path / "outside").write_text("mine")
    os.utime(tmp_path / "outside", (1, 1))
    body = b""
    server = serve(lambda handler: reply(handler, 200, body))
    for change in (
        lambda i: first(i).update(sha256="../../outside"),
        lambda i: first(i).update(name="../outside.tar"),
        lambda i: sample(i).update(image_offset=-1),
        lambda i: sample(i).update(image_bytes=10**30),
    ):
        body = changed(index_json, change)
        with pytest.raises(ValueError, match=rf"{server.url}/set/index.json: not a usable index"):
            open_shards(f"{server.url}/set", config.model_copy(update={"fetch": fetch}))
    assert {path for _, path, _ in server.requests} == {"/set/index.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside").stat().st_mtime == 1


def test_a_shard_of_a_petabyte_is_refused_before_anything_is_fetched(serve, index_json, config):
    body = changed(index_json, lambda i: first(i).update(bytes=10**15))
    server = serve(lambda handler: reply(handler, 200, body))
    with pytest.raises(ValueError, match=r"shard-000000.tar has 1000000000000000 bytes, data.cache_bytes="):
        open_shards(server.url, config)
    assert {path for _, path, _ in server.requests} == {"/index.json"}
    assert not Path(config.cache).exists()


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while True:
        handler.wfile.write(b"[" * (1 << 20))


@pytest.mark.parametrize("remote", ["http", "pipe"])
def test_an_endless_index_is_cut_off(serve, config, monkeypatch, remote):
    monkeypatch.setattr("ddetr.data.cache.MOST_INDEX_BYTES", 8 << 20)
    location = serve(endless).url if remote == "http" else "pipe:yes {}"
    with pytest.raises(SourceError, match=rf"index.json: has more than {8 << 20} bytes, the most that are read"):
        open_shards(location, config)


def test_nothing_is_decompressed(serve, index_json, config):
    packed = gzip.compress(index_json.encode())
    server = serve(lambda handler: reply(handler, 200, packed, Content_Encoding="gzip"))
    with pytest.raises(SourceError, match=r"sends it compressed \(gzip\), though asked for it as it is"):
        open_shards(server.url, config)
    assert len(server.requests) == 1
    assert server.requests[0][2]["accept-encoding"] == "identity"


def test_what_a_server_and_a_command_say_cannot_steer_a_terminal(serve, config):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 403 \x1b[31m\xc2\x9b2J no\r\nContent-Length: 0\r\n\r\n")

    command = r"pipe:printf '\033[31mno\n\033]0;title\007 http://me:secret@host/' >&2; false {}"
    for location in (serve(answer).url, command):
        with pytest.raises(SourceError) as error:
            open_shards(location, config)
        assert r"\x1b[31m" in str(error.value)
        assert str(error.value).isprintable()
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("length", ["-5", "many", "9" * 5000, "1, 2"])
def test_a_length_that_is_none_is_no_size(serve, synthetic_shards, config, length):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD":
            handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode())
            handler.close_connection = True
        else:
            files(synthetic_shards)(handler)

    index = open_shards(serve(answer).url, config)
    os.close(index.open(index.shards[0]))
    assert len(list((Path(config.cache) / FOLDER).glob("*.tar"))) == 1


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
        reads = [
            partial(evaluation_batches, index, 0, config, batch_size=4),
            lambda i=index: [ShardReader(i).sample(0, 0)],
        ]
        with pytest.raises(SampleError, match=rf"shard-000000.tar: sample {key}: ") as error:
            list(reads[not whole_way]())
        assert str(error.value).isprintable(), name
        if whole_way:
            stream = TrainStream(index, config, batch_size=4, accumulation=1, rank=0, world_size=1, seed=1)
            bad = [message for (batch,) in stream.steps(0) for message in batch.bad_samples]
            stream.close()
            assert [key in message for message in bad] == [True], name
            findings = check_shards(folder, workers=1)
            assert any(key in finding.where for finding in findings), name
            assert {finding.kind for finding in findings} <= {"wrong bytes", "unknown category", "wrong size"}, name
        shutil.rmtree(folder)


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


def test_rows_are_what_the_index_says(index_json, tmp_path):
    index = ShardIndex.parse(index_json.encode(), tmp_path, tmp_path)
    for shard, values in zip(index.shards, json.loads(index_json)["shards"], strict=True):
        for name in layout.SAMPLE_LIMITS:
            assert np.array_equal(shard.samples[name], [row[name] for row in values["samples"]])
