"""The streams on real shards: every sample exactly once, the same for any ranks and workers, resumable anywhere."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from ddetr.data.batch import Batch
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.shards import pack
from ddetr.data.stream import TrainStream, seen_sizes

from tests.data.consumer import BATCH_SIZE, recorded
from tests.data.consumer import CONFIG as CONSUMED
from tests.data.damage import cut_image
from tests.truth import coco_truth

CONSUMER = Path(__file__).with_name("consumer.py")

CONFIG = DataConfig(
    short_sides=(64, 80, 96),
    validation_short_side=64,
    long_side=128,
    crop_resize_short_sides=(80, 96),
    crop_sizes=(48, 72),
    shuffle_window=16,
    workers=0,
)


@pytest.fixture(scope="module")
def index(synthetic_shards) -> ShardIndex:
    index = ShardIndex.load(synthetic_shards)
    assert index.num_samples == 24
    assert len(index.shards) >= 2
    return index


def stream(index, workers=0, batch_size=4, accumulation=1, rank=0, world_size=1, seed=11, **changes) -> TrainStream:
    config = CONFIG.model_copy(update={"workers": workers, **changes})
    return TrainStream(
        index, config, batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size, seed=seed
    )


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def images_of(batch: Batch) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """image id -> (its unpadded pixels, boxes, labels)."""
    result = {}
    boxes = batch.boxes_cxcywh.split(batch.num_boxes.tolist())
    labels = batch.labels.split(batch.num_boxes.tolist())
    for n, image_id in enumerate(batch.image_ids.tolist()):
        height, width = (~batch.padding_mask[n]).sum(0).max(), (~batch.padding_mask[n]).sum(1).max()
        result[image_id] = (batch.images[n, :, :height, :width], boxes[n], labels[n])
    return result


@pytest.fixture(scope="module")
def one_shard(synthetic_shards, tmp_path_factory) -> ShardIndex:
    """The same images in a single shard."""
    coco = synthetic_shards.parent / "coco"
    return pack(coco / "annotations.json", coco / "images", tmp_path_factory.mktemp("one") / "shards", workers=1)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers", "batch_size"),
    [(1, 2, 2, 8), (2, 1, 0, 8), (2, 2, 1, 8), (4, 1, 3, 8), (1, 1, 4, 8), (3, 1, 1, 12), (8, 1, 0, 8)],
)
@pytest.mark.parametrize("shards", ["several", "one"])
def test_any_number_of_ranks_and_workers_sees_the_same_images_at_each_step(
    index, one_shard, shards, world_size, accumulation, workers, batch_size
):
    """Pixels, boxes and labels, against one rank without workers; and the order inside the global batch."""
    index = index if shards == "several" else one_shard
    whole = list(stream(index, batch_size=batch_size).steps(epoch=2))
    ranks = [stream(index, workers, batch_size, accumulation, rank, world_size) for rank in range(world_size)]
    divided = []
    for rank in ranks:
        divided.append(list(rank.steps(epoch=2)))
        rank.close()
    assert len(whole) == 24 // batch_size
    assert {len(steps) for steps in divided} == {24 // batch_size}
    for step, (batch,) in enumerate(whole):
        parts = [divided[rank][step][m] for m in range(accumulation) for rank in range(world_size)]
        assert torch.cat([part.image_ids for part in parts]).tolist() == batch.image_ids.tolist()
        expected = images_of(batch)
        for part in parts:
            for image_id, values in images_of(part).items():
                assert all(torch.equal(a, b) for a, b in zip(values, expected[image_id], strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_each_sample_once_and_drops_the_remainder(index, workers):
    everything = {int(i) for shard in index.shards for i in shard.samples["image_id"]}
    for batch_size, steps in ((4, 6), (5, 4), (24, 1)):
        with_workers = stream(index, workers, batch_size)
        seen = Counter(i for (batch,) in with_workers.steps(0) for i in batch.image_ids.tolist())
        with_workers.close()
        assert set(seen.values()) == {1}
        assert seen.total() == steps * batch_size == with_workers.steps_per_epoch * batch_size
        assert set(seen) <= everything


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 3])
def test_resuming_gives_the_rest_of_the_epoch_and_the_next(index, workers):
    whole = stream(index)
    expected = [batch for epoch in (0, 1) for (batch,) in whole.steps(epoch)]
    for first_step in (1, 4):
        resumed = stream(index, workers)
        batches = [b for (b,) in resumed.steps(0, first_step)] + [b for (b,) in resumed.steps(1)]
        resumed.close()
        assert len(batches) == len(expected) - first_step
        assert all(same(a, b) for a, b in zip(batches, expected[first_step:], strict=True))


@pytest.mark.integration
def test_a_stream_can_be_left_and_entered_anywhere(index):
    a_stream = stream(index, workers=1)
    expected = [batch for (batch,) in stream(index).steps(0)]
    steps = a_stream.steps(0)
    assert same(next(steps)[0], expected[0])
    assert same(next(a_stream.steps(0, 4))[0], expected[4])
    assert same(next(a_stream.steps(0, 5))[0], expected[5])
    assert same(next(steps)[0], expected[1])
    a_stream.close()


def test_epochs_and_seeds_change_order_and_augmentation(index):
    first, second = ([batch for (batch,) in stream(index).steps(epoch)] for epoch in (0, 1))
    other = [batch for (batch,) in stream(index, seed=12).steps(0)]
    for one, two in ((first, second), (first, other)):
        assert [b.image_ids.tolist() for b in one] != [b.image_ids.tolist() for b in two]
        images = [{i: v for b in batches for i, v in images_of(b).items()} for batches in (one, two)]
        different = [i for i in images[0] if not torch.equal(images[0][i][0], images[1][i][0])]
        assert len(different) >= 16  # one in a dozen draws the same view of the whole image twice


@pytest.mark.integration
def test_the_global_random_numbers_are_left_alone(index):
    """Else a model's dropout would depend on when its loader was opened."""
    before = torch.get_rng_state()
    a_stream = stream(index, workers=1)
    next(a_stream.steps(0))
    a_stream.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.integration
def test_closing_ends_the_workers(index):
    before = set(multiprocessing.active_children())
    a_stream = stream(index, workers=2)
    next(a_stream.steps(0))
    assert len(set(multiprocessing.active_children()) - before) == 2
    a_stream.close()
    assert set(multiprocessing.active_children()) == before


def test_bad_batch_sizes_are_named(index):
    with pytest.raises(ValueError, match=r"train.batch_size must be a multiple .* got 6"):
        stream(index, batch_size=6, world_size=4)
    with pytest.raises(ValueError, match=r"train.batch_size must be at most .* 24, got 25"):
        stream(index, batch_size=25)


@pytest.fixture
def own_index(synthetic_shards, tmp_path) -> ShardIndex:
    return ShardIndex.load(shutil.copytree(synthetic_shards, tmp_path / "shards"))


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_leaves_its_place_empty_and_is_named(own_index, workers):
    whole = [batch for (batch,) in stream(own_index).steps(0)]
    lost = int(whole[3].image_ids[1])
    shard, key = cut_image(own_index, lost)
    a_stream = stream(own_index, workers)
    batches = [batch for (batch,) in a_stream.steps(0)]
    a_stream.close()
    for step, (batch, expected) in enumerate(zip(batches, whole, strict=True)):
        if step != 3:
            assert same(batch, expected)
            assert batch.bad_samples == ()
            continue
        (message,) = batch.bad_samples
        assert re.search(rf"{shard}: sample {key}: the image .* is damaged.*data check", message)
        assert "\n" not in message
        assert batch.image_ids.tolist() == [-1 if i == lost else i for i in expected.image_ids.tolist()]
        assert batch.is_real.tolist() == [True, False, True, True]
        left, right = images_of(batch), images_of(expected)
        assert all(torch.equal(a, b) for i in left if i >= 0 for a, b in zip(left[i], right[i], strict=True))


def test_samples_of_a_shard_cut_short_while_training_are_named(own_index):
    shard = own_index.shards[0]
    os.truncate(shard.path, 2000)
    messages = [message for (batch,) in stream(own_index).steps(0) for message in batch.bad_samples]
    assert len(messages) >= len(shard.samples) - 2
    for message in messages:
        assert re.search(r"shard-000000.tar: sample \d{12}: the shard ends \d+ bytes early", message)


@pytest.mark.integration
@pytest.mark.parametrize(("batch_size", "world_size", "workers"), [(5, 1, 0), (10, 2, 2), (24, 3, 0), (36, 4, 1)])
def test_a_padded_epoch_has_every_sample_once(index, batch_size, world_size, workers):
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        a_stream = stream(index, workers, batch_size, rank=rank, world_size=world_size, remainder="pad")
        batches = [batch for (batch,) in a_stream.steps(1)]
        a_stream.close()
        assert len(batches) == a_stream.steps_per_epoch == -(-24 // batch_size)
        for batch in batches:
            assert len(batch.image_ids) == batch_size // world_size
            assert batch.is_real.tolist() == [i >= 0 for i in batch.image_ids.tolist()]
            assert not batch.num_boxes[~batch.is_real].any()
            seen.update(batch.image_ids[batch.is_real].tolist())
    assert seen == Counter(int(i) for shard in index.shards for i in shard.samples["image_id"])


def test_images_of_a_step_are_of_similar_size(coco_free, tmp_path):
    """Against the same images as the shuffling has them; the index alone tells the sizes that the pixels then have."""
    index = pack(coco_free / "annotations.json", coco_free / "images", tmp_path, workers=1)
    shares = []
    for similar in (True, False):
        padded, seen = 0, set()
        a_stream = stream(index, batch_size=4, similar_sizes=similar, shuffle_window=128)
        for (batch,) in a_stream.steps(0):
            padded += int(batch.padding_mask.sum())
            seen.update(batch.image_ids.tolist())
            sizes = [tuple(image.shape[1:]) for image, _, _ in images_of(batch).values()]
            rows = np.flatnonzero(np.isin(index.samples["image_id"], batch.image_ids))
            assert sorted(map(tuple, seen_sizes(index.samples, a_stream._config, 11, 0, rows).tolist())) == sorted(
                sizes
            )
        assert len(seen) == 120
        shares.append(padded)
    assert shares[0] < shares[1] / 3


@pytest.mark.integration
def test_workers_end_with_their_trainer(synthetic_shards):
    program = (
        "import sys, time, multiprocessing;"
        "from ddetr.data.config import DataConfig; from ddetr.data.index import ShardIndex;"
        "from ddetr.data.stream import TrainStream;"
        "s = TrainStream(ShardIndex.load(sys.argv[1]), DataConfig(short_sides=(64,), crop=False, workers=2),"
        "                batch_size=4, accumulation=1, rank=0, world_size=1, seed=0);"
        "next(s.steps(0));"
        "print(*[p.pid for p in multiprocessing.active_children()], flush=True);"
        "time.sleep(60 if sys.argv[2] == 'wait' else 0)"
    )
    for behaviour in ("wait", "leave"):  # killed, and ended without closing its stream
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(synthetic_shards), behaviour], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if behaviour == "wait":
            process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == (-signal.SIGKILL if behaviour == "wait" else 0)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in workers):
            assert time.monotonic() < deadline, "loader workers outlive their trainer"
            time.sleep(0.1)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.integration
def test_real_coco_with_the_published_augmentation(coco_free, tmp_path):
    index = pack(coco_free / "annotations.json", coco_free / "images", tmp_path, workers=1)
    truth = coco_truth(index)
    single = Counter(a["image_id"] for a in truth["annotations"] if not a["iscrowd"])
    config = DataConfig(short_sides=(128, 160), long_side=320, crop_resize_short_sides=(100,), crop_sizes=(64, 100))
    a_stream = TrainStream(index, config, batch_size=11, accumulation=1, rank=0, world_size=1, seed=0)
    found: Counter[int] = Counter()
    for (batch,) in a_stream.steps(0):
        corners = torch.cat((batch.boxes_cxcywh[:, :2] - batch.boxes_cxcywh[:, 2:] / 2,), 1)
        assert corners.min() >= -1e-6
        assert (batch.boxes_cxcywh[:, :2] + batch.boxes_cxcywh[:, 2:] / 2).max() <= 1 + 1e-6
        assert (batch.boxes_cxcywh[:, 2:] > 0).all()
        assert batch.labels.min() >= 0
        assert batch.labels.max() < len(index.categories) == 80
        found.update(dict(zip(batch.image_ids.tolist(), batch.num_boxes.tolist(), strict=True)))
        if 86 in batch.image_ids.tolist():  # a grayscale JPEG
            pixels = images_of(batch)[86][0]
            assert torch.equal(pixels[0], pixels[1])
    a_stream.close()
    assert len(found) == 121
    assert found[508] == 0
    assert all(found[image_id] <= single[image_id] for image_id in found)
    assert found.total() > 0.8 * single.total()


@pytest.mark.slow
def test_killed_twenty_times_an_epoch_is_still_each_sample_once(coco_free, tmp_path):
    """SIGKILL after a random number of steps; each time it goes on with other numbers of ranks and workers."""
    index = pack(coco_free / "annotations.json", coco_free / "images", tmp_path / "shards", workers=1)
    record, random = tmp_path / "record", np.random.default_rng(0)
    kills = 0
    while True:
        ranks, workers = int(random.choice([1, 2, 4])), int(random.choice([0, 1, 2]))
        command = [sys.executable, str(CONSUMER), str(tmp_path / "shards"), str(record), str(ranks), str(workers)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(int(random.integers(1, 3)) if kills < 20 else 1000):
            if process.stdout.readline().strip() in ("end", ""):
                break
        if kills == 20:
            assert process.wait(60) == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kills += 1
    seen = Counter(i for ids in recorded(record) for i in ids)
    assert seen == Counter(index.samples["image_id"].tolist())
    config = DataConfig.model_validate({**CONSUMED, "workers": 0})
    whole = TrainStream(index, config, batch_size=BATCH_SIZE, accumulation=1, rank=0, world_size=1, seed=5)
    expected = [sorted(batch.image_ids[batch.is_real].tolist()) for (batch,) in whole.steps(3)]
    assert [sorted(ids) for ids in recorded(record)] == expected
