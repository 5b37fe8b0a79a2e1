"""The evaluation stream: each image once, in batches of one size, without those that are damaged."""

import shutil
from collections import Counter
from dataclasses import fields

import pytest
import torch
from ddetr.data.batch import Batch
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.shards import pack
from ddetr.data.stream import evaluation_batches
from ddetr.data.views import evaluation_view

from tests.data.damage import cut_image

CONFIG = DataConfig(validation_short_side=64, long_side=128, workers=0)


@pytest.fixture
def own_index(synthetic_shards, tmp_path) -> ShardIndex:
    return ShardIndex.load(shutil.copytree(synthetic_shards, tmp_path / "shards"))


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def evaluated(index: ShardIndex, shard: int, config: DataConfig) -> list[Batch]:
    parts = list(evaluation_batches(index, [shard], config, batch_size=4))
    assert not any(part.bad_samples for part in parts)
    batches = [part.batch for part in parts if part.batch is not None]
    for part, batch in zip(parts, batches, strict=True):
        assert [entry["image_id"] for entry in part.entries] == batch.image_ids.tolist()
    return batches


@pytest.mark.parametrize("workers", [0, 3])
def test_evaluation_sees_each_image_once_in_batches_of_one_size(coco_free, tmp_path, workers):
    index = pack(coco_free / "annotations_val.json", coco_free / "images", tmp_path, workers=1, shard_bytes=4 << 20)
    config = DataConfig(validation_short_side=96, long_side=160, workers=workers)
    seen: Counter[int] = Counter()
    for number, shard in enumerate(index.shards):
        batches = evaluated(index, number, config)
        again = evaluated(index, number, config)
        assert all(same(a, b) for a, b in zip(batches, again, strict=True))
        assert max(len(batch.image_ids) for batch in batches) == 4
        size_of = {int(s["image_id"]): (int(s["height"]), int(s["width"])) for s in shard.samples}
        for batch in batches:
            assert not batch.padding_mask.any()
            for image_id, size in zip(batch.image_ids.tolist(), batch.original_sizes.tolist(), strict=True):
                assert tuple(size) == size_of[image_id]
                assert evaluation_view(*size, config).size == tuple(batch.images.shape[2:])
        seen.update(i for batch in batches for i in batch.image_ids.tolist())
    assert len(seen) == 44
    assert set(seen.values()) == {1}


def test_evaluation_leaves_out_a_broken_image_and_can_be_left(own_index):
    image_id = int(own_index.shards[0].samples[2]["image_id"])
    shard, key = cut_image(own_index, image_id)
    others = set(own_index.shards[0].samples["image_id"].tolist()) - {image_id}
    for workers in (0, 2):
        config = CONFIG.model_copy(update={"workers": workers})
        for batch_size in (1, 2):
            parts = list(evaluation_batches(own_index, [0], config, batch_size=batch_size))
            (bad,) = [message for part in parts for message in part.bad_samples]
            assert f"{shard}: sample {key}: the image in the shard is damaged" in bad
            seen = [i for part in parts if part.batch for i in part.batch.image_ids.tolist()]
            assert set(seen) == others
            assert [entry["image_id"] for part in parts for entry in part.entries] == seen
        left = evaluation_batches(own_index, [1], config, batch_size=2)
        next(left)
        left.close()
