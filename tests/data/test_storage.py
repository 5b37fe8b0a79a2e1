"""Every storage gives the bytes of the shard's file; what a reader has open is its own."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from ddetr.data.cache import CachedStorage, open_shards
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex, ShardReader
from ddetr.data.storage import LocalStorage, RangedStorage

from tests.data.file_server import FileServer, damaged


@pytest.fixture
def server(synthetic_shards: Path) -> Iterator[FileServer]:
    server = FileServer(synthetic_shards)
    yield server
    server.close()


@pytest.mark.parametrize("kind", [LocalStorage, CachedStorage, RangedStorage])
def test_a_storage_gives_the_bytes_of_the_file(kind: type, server: FileServer, synthetic_shards: Path, tmp_path: Path):
    fetch = "samples" if kind is RangedStorage else "shards"
    config = DataConfig.model_validate({"cache": str(tmp_path / "cache"), "fetch": fetch, "fetch_attempts": 1})
    index = open_shards(str(synthetic_shards) if kind is LocalStorage else server.url, config)
    assert type(index.storage) is kind
    before = len(os.listdir("/proc/self/fd"))
    storages = [index.storage.anew(), index.storage.anew()]
    for shard in index.shards:
        data = (synthetic_shards / shard.name).read_bytes()
        for begin, end in ((0, 1), (513, 5000), (len(data) - 10, len(data))):
            assert [storage.read(shard, begin, end) for storage in storages] == [data[begin:end]] * 2
    if kind is not RangedStorage:
        storages[0].close()
        assert storages[1].read(index.shards[0], 0, 5) == (synthetic_shards / index.shards[0].name).read_bytes()[:5]
        storages[1].close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_goes_to_other_processes_without_what_is_open(synthetic_shards: Path) -> None:
    index = ShardIndex.load(synthetic_shards)
    reader = ShardReader(index)
    images = [reader.image(shard, 0) for shard in range(len(index.shards))]
    sent = pickle.loads(pickle.dumps(index))
    reader.close()
    other = ShardReader(sent)
    assert [other.image(shard, 0) for shard in range(len(index.shards))] == images
    other.close()


def test_a_sample_that_arrives_damaged_is_asked_for_once_more(server: FileServer, synthetic_shards: Path) -> None:
    index = open_shards(server.url, DataConfig(fetch="samples", fetch_attempts=1))
    server.requests.clear()
    server.faults = [damaged]
    expected = ShardReader(ShardIndex.load(synthetic_shards)).sample(0, 0)
    assert ShardReader(index).sample(0, 0) == expected
    assert len(server.requests) == 2
    server.faults = [damaged] * 2
    with pytest.raises(ValueError, match=r"the image in the shard is damaged \(its checksum is wrong\)"):
        ShardReader(index).sample(0, 0)
    assert len(server.requests) == 4
