"""The cache deletes and touches what it has made, and nothing else, whatever lies beside it."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ddetr.data.cache import ABANDONED_SECONDS, FOLDER, MARK, MARK_TEXT, open_shards
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.sources import SourceError

from tests.data.file_server import FileServer

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def server(synthetic_shards: Path) -> Iterator[FileServer]:
    server = FileServer(synthetic_shards)
    yield server
    server.close()


@pytest.fixture
def config(tmp_path: Path, synthetic_shards: Path) -> DataConfig:
    """Room for one shard."""
    largest = max(shard.bytes for shard in ShardIndex.load(synthetic_shards).shards)
    return DataConfig(cache=str(tmp_path / "cache"), cache_bytes=largest, fetch_attempts=2, fetch_timeout_seconds=5)


def snapshot(folder: Path) -> dict[str, tuple[float, bytes]]:
    paths = (path for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime, path.read_bytes()) for path in paths}


def fetch_all(url: str, config: DataConfig) -> None:
    index = open_shards(url, config)
    for shard in index.shards:
        index.storage.ensure(shard)


def test_what_is_beside_the_caches_folder_is_not_touched(server, synthetic_shards, config):
    cache = Path(shutil.copytree(synthetic_shards, config.cache))
    for name in (f"{DIGEST}.tar", f"{DIGEST}.partial", "room.lock", "mine.lock", ".cache.partial"):
        (cache / name).write_text("mine")
    for path in cache.iterdir():
        os.utime(path, (1, 1))
    before = snapshot(cache)
    fetch_all(server.url, config)
    assert {name: found for name, found in snapshot(cache).items() if not name.startswith(FOLDER)} == before
    assert len(list((cache / FOLDER).glob("*.tar"))) == 1


def test_inside_its_folder_only_ordinary_files_of_its_own_names_are_touched(server, config, tmp_path):
    fetch_all(server.url, config)
    folder = Path(config.cache) / FOLDER
    assert (folder / MARK).read_text() == MARK_TEXT
    outside = tmp_path / "outside.tar"
    outside.write_bytes(bytes(10_000))
    names = [
        "shard-000000.tar",
        f"{DIGEST[:-1]}.tar",
        f"{DIGEST.upper()}.tar",
        f"{DIGEST}.tar.bak",
        "x.partial",
        "x.lock",
    ]
    for name in names:
        (folder / name).write_bytes(bytes(10_000))
    (folder / f"{DIGEST[::-1]}.tar").symlink_to(outside)
    (folder / f"{DIGEST[::-1]}.partial").symlink_to(outside)
    (folder / f"{'a' * 64}.tar").mkdir()
    (folder / f"{'a' * 64}.tar" / "file.tar").write_text("mine")
    old = time.time() - 2 * ABANDONED_SECONDS
    for path in (*(folder / name for name in names), outside):
        os.utime(path, (old, old))
    before, links = snapshot(tmp_path), {path for path in folder.iterdir() if path.is_symlink()}
    (abandoned := folder / f"{DIGEST}.partial").write_bytes(bytes(100))
    os.utime(abandoned, (old, old))
    fetch_all(server.url, config)
    assert not abandoned.exists()
    own = {name for name in before if len(Path(name).stem) == 64 and name not in {f"cache/{FOLDER}/{n}" for n in names}}
    after = snapshot(tmp_path)
    assert {name: found for name, found in before.items() if name not in own} == {
        name: after.get(name) for name in before if name not in own
    }
    assert links == {path for path in folder.iterdir() if path.is_symlink()}


@pytest.mark.parametrize("suffix", [".tar", ".partial", ".lock"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_link_or_pipe_where_a_shard_should_be_is_refused(server, synthetic_shards, config, tmp_path, suffix, kind):
    index = open_shards(server.url, config)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    os.utime(outside, (1, 1))
    place = Path(config.cache) / FOLDER / f"{index.shards[0].sha256}{suffix}"
    if kind == "link":
        place.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(SourceError, match=rf"{place}: not an ordinary file"):
        index.storage.ensure(index.shards[0])
    assert (outside.read_text(), outside.stat().st_mtime) == ("mine", 1)
    assert stat.S_IFMT(place.lstat().st_mode) != stat.S_IFREG


@pytest.mark.parametrize("kind", ["full", "file", "link", "other mark", "linked mark"])
def test_a_folder_of_somebody_else_is_refused_with_one_message(server, config, tmp_path, kind):
    place = Path(config.cache) / FOLDER
    if kind == "file":
        place.parent.mkdir()
        place.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        place.parent.mkdir()
        place.symlink_to(tmp_path / "elsewhere")
        (place / MARK).write_text(MARK_TEXT)
    else:
        place.mkdir(parents=True)
        (place / "file.tar").write_text("mine")
    if kind == "other mark":
        (place / MARK).write_text(MARK_TEXT.splitlines()[0] + "\n# of another program\n")
    elif kind == "linked mark":
        (tmp_path / "mark").write_text(MARK_TEXT)
        (place / MARK).symlink_to(tmp_path / "mark")
    before = snapshot(tmp_path)
    with pytest.raises(
        FileExistsError, match=rf"{place}: not a folder that ddetr has made.*Set data.cache to"
    ) as error:
        open_shards(server.url, config)
    assert "\n" not in str(error.value)
    assert snapshot(tmp_path) == before
    assert [path.name for path in place.parent.iterdir()] == [FOLDER]


def test_an_empty_folder_of_that_name_is_taken(server, config):
    (Path(config.cache) / FOLDER).mkdir(parents=True)
    fetch_all(server.url, config)
    assert (Path(config.cache) / FOLDER / MARK).exists()


def test_a_shard_larger_than_the_cache_is_refused_before_anything_is_fetched_or_deleted(
    server, synthetic_shards, config
):
    index = open_shards(server.url, config)
    index.storage.ensure(index.shards[0])
    before = snapshot(Path(config.cache))
    server.requests.clear()
    small = config.model_copy(update={"cache_bytes": config.cache_bytes - 1})
    largest = max(ShardIndex.load(synthetic_shards).shards, key=lambda shard: shard.bytes)
    message = rf"{largest.name} has {largest.bytes} bytes, data.cache_bytes={largest.bytes - 1} .*data.fetch=samples"
    with pytest.raises(ValueError, match=message):
        open_shards(server.url, small)
    assert [name for _, name, _ in server.requests] == ["index.json"]
    assert snapshot(Path(config.cache)) == before
    assert open_shards(server.url, small.model_copy(update={"fetch": "samples"})).num_samples == index.num_samples


@pytest.mark.integration
def test_more_than_the_index_says_is_cut_off_and_not_stored(synthetic_shards, config, tmp_path):
    """By a server without Content-Length, and by a command: neither ends."""
    folder = Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))
    location = f"pipe:case {{}} in *.tar) yes;; *) cat {folder}/{{}};; esac"
    index = open_shards(location, config)
    shard = index.shards[0]
    with pytest.raises(SourceError, match=rf"{shard.name}.* has more than the {shard.bytes} bytes of the index"):
        index.storage.ensure(shard)
    stored = list((Path(config.cache) / FOLDER).glob("*.partial"))
    assert [path.stat().st_size <= shard.bytes for path in stored] == [True]


def test_a_cache_that_this_account_may_only_read_gives_what_is_there(server, synthetic_shards, config, monkeypatch):
    """As another account is told: root may write nearly everywhere."""
    config = config.model_copy(update={"cache_bytes": 1 << 30})
    fetch_all(server.url, config)
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    index = open_shards(server.url, config)
    (Path(config.cache) / FOLDER / f"{index.shards[0].sha256}.tar").unlink()
    for cache in (config.cache, f"{config.cache}-new"):
        message = rf"data.cache={cache}: shards cannot be kept there: .* cannot be written to .*data.fetch=samples"
        with pytest.raises(OSError, match=message):
            open_shards(server.url, config.model_copy(update={"cache": cache}))


def test_a_cache_that_is_gone_is_said(server, config):
    index = open_shards(server.url, config)
    shutil.rmtree(config.cache)
    with pytest.raises(SourceError, match=rf"data.cache={config.cache}: shards cannot be kept there: .*No such file"):
        index.storage.ensure(index.shards[0])


def test_a_cache_below_a_home_that_nobody_knows_is_said(server, config):
    config = config.model_copy(update={"cache": "~nobody-of-that-name/shards"})
    message = r"data.cache=~nobody-of-that-name/shards: .* no home is known for ~nobody-of-that-name. Set data.cache"
    with pytest.raises(ValueError, match=message):
        open_shards(server.url, config)
    assert open_shards(server.url, config.model_copy(update={"fetch": "samples"})).num_samples > 0


def test_a_folder_that_cannot_get_its_name_leaves_nothing(server, config, monkeypatch):
    def busy(self: Path, target: Path) -> Path:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match=rf"busy: '{config.cache}/{FOLDER}'"):
        open_shards(server.url, config)
    assert not list(Path(config.cache).iterdir())


def test_a_lock_that_was_deleted_while_it_was_waited_for_is_taken_anew(server, config, monkeypatch):
    index = open_shards(server.url, config)
    shard = index.shards[0]
    lock = Path(config.cache) / FOLDER / f"{shard.sha256}.lock"
    waited = []

    def flock(descriptor: int, operation: int) -> None:
        if not waited:
            lock.unlink()
        waited.append(os.fstat(descriptor).st_nlink)

    monkeypatch.setattr("ddetr.data.cache.fcntl.flock", flock)
    index.storage.ensure(shard)
    assert waited[:3] == [0, 0, 1]  # locked and given back; then of a file that is there
    assert lock.exists()
