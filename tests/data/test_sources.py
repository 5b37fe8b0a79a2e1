"""Shards from a real HTTP server, a real S3 server and commands, with faults; and their local cache."""

import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ddetr.data.cache import FOLDER, open_shards
from ddetr.data.config import DataConfig
from ddetr.data.files import file_sha256
from ddetr.data.index import ShardIndex
from ddetr.data.sources import SourceError, source_of
from ddetr.data.stream import TrainStream, evaluation_batches

from tests.data.file_server import Fault, FileServer, cut, damaged, stall, status
from tests.truth import coco_truth

SEEN = {"short_sides": (64,), "validation_short_side": 64, "long_side": 128, "crop": False, "shuffle_window": 8}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig.model_validate(
        {**SEEN, "workers": 0, "cache": str(tmp_path / "cache"), "fetch_attempts": 3, "fetch_timeout_seconds": 3}
    )


@pytest.fixture
def server(synthetic_shards: Path) -> Iterator[FileServer]:
    server = FileServer(synthetic_shards)
    yield server
    server.close()


def images_of_epoch(index: ShardIndex, config: DataConfig) -> list[torch.Tensor]:
    stream = TrainStream(index, config, batch_size=4, accumulation=1, rank=0, world_size=1, seed=1)
    try:
        return [batch.images for (batch,) in stream.steps(0)]
    finally:
        stream.close()


def assert_same_epoch(location: str, folder: Path, config: DataConfig) -> ShardIndex:
    index = open_shards(location, config)
    expected = images_of_epoch(ShardIndex.load(folder), config)
    for ours, theirs in zip(images_of_epoch(index, config), expected, strict=True):
        assert torch.equal(ours, theirs)
    return index


def cached(config: DataConfig) -> list[Path]:
    return sorted((Path(config.cache) / FOLDER).glob("*.tar"))


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_batches_and_each_shard_is_fetched_once(server, synthetic_shards, config, workers):
    config = config.model_copy(update={"workers": workers})
    index = assert_same_epoch(server.url, synthetic_shards, config)
    fetched = [name for method, name, _ in server.requests if method == "GET" and name.endswith(".tar")]
    assert sorted(fetched) == [shard.name for shard in index.shards]
    assert [file_sha256(path) for path in cached(config)] == sorted(shard.sha256 for shard in index.shards)
    # What is there is not fetched again, and evaluation reads the same copies.
    again = open_shards(server.url, config)
    expected = evaluation_batches(ShardIndex.load(synthetic_shards), [1], config, batch_size=4)
    for ours, theirs in zip(evaluation_batches(again, [1], config, batch_size=4), expected, strict=True):
        assert torch.equal(ours.batch.images, theirs.batch.images)
    assert len([name for method, name, _ in server.requests if name.endswith(".tar") and method == "GET"]) == len(
        fetched
    )


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[status(500), status(503)], [cut, status(502)], [stall], [damaged], [status(429)]])
def test_http_faults_that_pass_are_overcome(synthetic_shards, config, faults: list[Fault], ranges: bool):
    server = FileServer(synthetic_shards, ranges)
    server.faults = list(faults)
    try:
        assert_same_epoch(server.url, synthetic_shards, config)
        assert not server.faults
        resumed = [wanted for _, name, wanted in server.requests if name.endswith(".tar") and wanted]
        assert bool(resumed) == any(fault in (cut, stall) for fault in faults)
    finally:
        server.close()


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([status(500)] * 40, r"the server answered 500.*gave up after 3 attempts"),
        ([status(403)] * 40, r"the server answered 403"),
        ([damaged] * 40, r"its checksum is not that of the index"),
    ],
)
def test_http_faults_that_stay_name_shard_and_address(server, config, faults, message, workers):
    server.faults = list(faults)
    index = open_shards(server.url, config)
    with pytest.raises(SourceError, match=rf"{server.url}/shard-0000\d\d.tar: {message}") as error:
        images_of_epoch(index, config.model_copy(update={"workers": workers}))
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_what_is_missing_or_cut_at_the_source_is_found_before_training(synthetic_shards, tmp_path, config):
    folder = Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))
    server = FileServer(folder)
    try:
        first, second = sorted(folder.glob("*.tar"))[:2]
        first.unlink()
        os.truncate(second, 1000)
        with pytest.raises(
            FileNotFoundError, match=rf"{first.name} is missing; {second.name} has 1000 bytes instead of"
        ):
            open_shards(server.url, config)
        (folder / "index.json").unlink()
        with pytest.raises(SourceError, match=rf"{server.url}/index.json: the server answered 404"):
            open_shards(server.url, config)
    finally:
        server.close()


def test_a_server_that_is_not_there(config):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(SourceError, match=rf"{url}/index.json: the server cannot be reached .*gave up after 3"):
            open_shards(url, config)


def test_passwords_are_not_told(config):
    with pytest.raises(SourceError) as error:
        open_shards("http://me:secret@127.0.0.1:9/shards?token=secret", config)
    assert "secret" not in str(error.value)


def parts_of(server: FileServer) -> list[str]:
    return [wanted for method, name, wanted in server.requests if method == "GET" and name.endswith(".tar") and wanted]


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_alone_are_fetched_where_that_is_asked_for(server, synthetic_shards, config, workers):
    config = config.model_copy(update={"fetch": "samples", "workers": workers})
    index = open_shards(server.url, config)
    server.requests.clear()
    half = [
        TrainStream(index, config, batch_size=4, accumulation=1, rank=rank, world_size=2, seed=1) for rank in range(2)
    ]
    whole = TrainStream(
        ShardIndex.load(synthetic_shards), config, batch_size=4, accumulation=1, rank=0, world_size=1, seed=1
    )
    for (one,), (other,), (both,) in zip(*(stream.steps(0) for stream in (*half, whole)), strict=True):
        assert torch.equal(torch.cat([one.image_ids, other.image_ids]), both.image_ids)
        assert torch.equal(one.boxes_cxcywh, both.boxes_cxcywh[: len(one.labels)])
    for stream in (*half, whole):
        stream.close()
    assert len(set(parts_of(server))) >= index.num_samples - 3  # the last images fill no batch of 4
    assert not Path(config.cache).exists()

    expected = evaluation_batches(ShardIndex.load(synthetic_shards), [1], config, batch_size=4)
    for ours, theirs in zip(evaluation_batches(index, [1], config, batch_size=4), expected, strict=True):
        assert torch.equal(ours.batch.images, theirs.batch.images)
    assert coco_truth(index) == coco_truth(ShardIndex.load(synthetic_shards))


@pytest.mark.parametrize("faults", [[status(500), status(503)], [cut, status(502)], [stall], [damaged], [status(429)]])
def test_faults_while_samples_are_fetched_are_overcome(server, synthetic_shards, config, faults: list[Fault]):
    samples = config.model_copy(update={"fetch": "samples"})
    index = open_shards(server.url, samples)
    server.faults = list(faults)
    for ours, theirs in zip(
        images_of_epoch(index, samples), images_of_epoch(ShardIndex.load(synthetic_shards), config), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not server.faults


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_faults_of_samples_that_stay_name_shard_and_address(server, config, workers):
    samples = config.model_copy(update={"fetch": "samples", "workers": workers})
    index = open_shards(server.url, samples)
    server.faults = [status(500)] * 400
    with pytest.raises(
        SourceError, match=rf"{server.url}/shard-0000\d\d.tar: the server answered 500.*gave up after 3"
    ):
        images_of_epoch(index, samples)
    assert not multiprocessing.active_children()


@pytest.mark.integration
def test_who_gives_whole_files_only_is_refused_at_once(synthetic_shards, config):
    samples = config.model_copy(update={"fetch": "samples"})
    server = FileServer(synthetic_shards, ranges=False)
    try:
        with pytest.raises(SourceError, match=r"the server gives no parts of files; set data.fetch=shards"):
            open_shards(server.url, samples)
    finally:
        server.close()
    with pytest.raises(SourceError, match=r"a command gives no parts of files; set data.fetch=shards"):
        open_shards(f"pipe:cat {shlex.quote(str(synthetic_shards))}/{{}}", samples)


def test_a_cache_too_small_for_the_set_is_said(server, synthetic_shards, config, caplog):
    largest = max(shard.bytes for shard in ShardIndex.load(synthetic_shards).shards)
    open_shards(server.url, config.model_copy(update={"cache_bytes": largest}))
    assert "each epoch fetches all of them anew" in caplog.text
    assert "data.fetch=samples" in caplog.text


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.mark.integration
def test_s3_gives_the_same_batches(s3_server, synthetic_shards, config, monkeypatch, tmp_path):
    import boto3

    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="sets")
    for path in synthetic_shards.iterdir():
        client.upload_file(str(path), "sets", f"coco/train/{path.name}")
    assert_same_epoch("s3://sets/coco/train", synthetic_shards, config.model_copy(update={"workers": 2}))

    samples = config.model_copy(update={"fetch": "samples", "cache": str(tmp_path / "unused")})
    assert_same_epoch("s3://sets/coco/train", synthetic_shards, samples)
    assert not Path(samples.cache).exists()

    # Half of a shard was fetched by a process that is gone: the rest is fetched by range.
    (whole, *_) = cached(config)
    whole.with_suffix(".partial").write_bytes(whole.read_bytes()[:3000])
    whole.unlink()
    assert_same_epoch("s3://sets/coco/train", synthetic_shards, config)

    (name,) = (path.name for path in synthetic_shards.glob("*.tar") if file_sha256(path) == whole.stem)
    assert list(source_of("s3://sets/coco/train", 3).read(name, whole.stat().st_size)) == [], "nothing is left of it"
    client.delete_object(Bucket="sets", Key=f"coco/train/{name}")
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        open_shards("s3://sets/coco/train", config)
    with pytest.raises(SourceError, match=r"s3://sets/elsewhere/index.json: S3 answered: .*NoSuchKey"):
        open_shards("s3://sets/elsewhere", config)
    with pytest.raises(SourceError, match=r"s3://nowhere/index.json: S3 answered: .*NoSuchBucket"):
        open_shards("s3://nowhere", config)


@pytest.mark.integration
def test_a_command_gives_the_same_batches(synthetic_shards, config):
    assert_same_epoch(f"pipe:cat {shlex.quote(str(synthetic_shards))}/{{}}", synthetic_shards, config)


@pytest.mark.integration
def test_commands_that_fail_or_hang_are_named(synthetic_shards, config):
    folder = shlex.quote(str(synthetic_shards))
    with pytest.raises(
        SourceError, match=r"pipe:cat /nowhere/index.json: the command ended with status 1: .*No such file"
    ):
        open_shards("pipe:cat /nowhere/{}", config)
    impatient = config.model_copy(update={"fetch_timeout_seconds": 2})  # the index comes in that time on a busy machine
    with pytest.raises(SourceError, match=r"index.json.*: the command did not end within 0.5 s; gave up after 1 "):
        open_shards(
            f"pipe:cat {folder}/{{}}; exec >&-; sleep 60",
            config.model_copy(update={"fetch_timeout_seconds": 0.5, "fetch_attempts": 1}),
        )
    silent = open_shards(f"pipe:case {{}} in *.tar) sleep 60;; *) cat {folder}/{{}};; esac", impatient)
    with pytest.raises(SourceError, match=r"shard-0000\d\d.tar.*the command was silent for 2 s; gave up after 3"):
        images_of_epoch(silent, impatient)
    with pytest.raises(ValueError, match=r"needs \{\} in place of a file's name"):
        open_shards("pipe:cat shard.tar", config)


def test_the_cache_keeps_to_its_limit(server, synthetic_shards, config):
    shards = ShardIndex.load(synthetic_shards).shards
    limit = max(shard.bytes for shard in shards) + min(shard.bytes for shard in shards)
    small = config.model_copy(update={"cache_bytes": limit})
    index = open_shards(server.url, small)
    for epoch in range(2):
        for number, shard in enumerate(index.shards):
            index.storage.ensure(shard)
            assert sum(path.stat().st_size for path in cached(config)) <= limit
            assert any(path.stem == shard.sha256 for path in cached(config)), (epoch, number)
    assert_same_epoch(server.url, synthetic_shards, small)


def open_all(url: str, config: DataConfig, begin: "multiprocessing.synchronize.Barrier") -> None:
    index = open_shards(url, config)
    begin.wait()
    for shard in index.shards:
        index.storage.ensure(shard)


@pytest.mark.integration
def test_many_processes_fetch_a_shard_once(server, synthetic_shards, config):
    begin = multiprocessing.Barrier(6)
    processes = [multiprocessing.Process(target=open_all, args=(server.url, config, begin)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    fetched = [name for method, name, _ in server.requests if method == "GET" and name.endswith(".tar")]
    assert sorted(fetched) == [path.name for path in sorted(synthetic_shards.glob("*.tar"))]


@pytest.mark.integration
def test_a_killed_process_leaves_a_cache_that_works(server, synthetic_shards, config):
    """Killed in the middle of a shard, which it holds the lock of: another fetches the rest."""
    server.faults = [stall]
    slow = config.model_copy(update={"fetch_timeout_seconds": 30.0})
    process = multiprocessing.Process(target=open_all, args=(server.url, slow, multiprocessing.Barrier(1)))
    process.start()
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in (Path(config.cache) / FOLDER).glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not cached(config)
    assert_same_epoch(server.url, synthetic_shards, config)
    assert not list((Path(config.cache) / FOLDER).glob("*.partial"))
