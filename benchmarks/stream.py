"""CPU time per image of the streams against torchvision's CocoDetection with the published chain of transforms.

    python benchmarks/stream.py COCO_JSON IMAGES [--images 64] [--rounds 5]

The baseline follows the published code: files opened one by one and decoded by PIL, resize, crop and resize again,
float tensors normalised on the host. The clock is this process's CPU time, one thread, no workers; the two take turns,
so that a busy machine slows both. The second table is what it costs to hand a batch from a worker process to the
trainer, CPU time of both: ours against the published batch, which is the floats, a mask, and seven tensors an image.
"""

import argparse
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ddetr.data.batch import IMAGE_MEAN, IMAGE_STD, Batch, Sample, collate
from ddetr.data.boxes import clip, xywh_to_xyxy, xyxy_to_cxcywh
from ddetr.data.config import DataConfig
from ddetr.data.shards import ShardIndex, pack
from ddetr.data.stream import TrainStream, evaluation_batches
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import CocoDetection
from torchvision.transforms import functional as F

BATCH_SIZE = 4
CONFIG = DataConfig.model_validate({"workers": 0})
HEIGHT, WIDTH = 800, 1088  # of the images handed over
BATCHES = 50


def training_batches(index: ShardIndex) -> Iterator[Batch]:
    stream = TrainStream(index, CONFIG, batch_size=BATCH_SIZE, accumulation=1, rank=0, world_size=1, seed=0)
    for (batch,) in stream.steps(0):
        yield batch


def ours_training(index: ShardIndex, count: int) -> Iterator[int]:
    for batch in islice(training_batches(index), count // BATCH_SIZE):
        yield len(batch.image_ids)


def ours_evaluation(index: ShardIndex, count: int) -> Iterator[int]:
    for part in islice(evaluation_batches(index, [0], CONFIG, batch_size=BATCH_SIZE), count // BATCH_SIZE):
        yield len(part.entries)


def baseline(dataset: CocoDetection, count: int, training: bool) -> Iterator[int]:
    numbers = random.Random(0).sample(range(len(dataset)), count)
    for start in range(0, count, BATCH_SIZE):
        samples = [published_sample(*dataset[i], training) for i in numbers[start : start + BATCH_SIZE]]
        images = [image for image, _ in samples]
        height, width = (max(image.shape[d] for image in images) for d in (1, 2))
        batch = torch.zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for n, image in enumerate(images):
            batch[n, :, : image.shape[1], : image.shape[2]] = image
            mask[n, : image.shape[1], : image.shape[2]] = False
        yield len(images)


def published_sample(image: Any, annotations: list[dict[str, Any]], training: bool) -> tuple[Tensor, Tensor]:
    boxes = torch.tensor([a["bbox"] for a in annotations if not a["iscrowd"]], dtype=torch.float32).reshape(-1, 4)
    boxes = clip(xywh_to_xyxy(boxes), image.height, image.width)

    def resize(short_side: int, long_side: int | None) -> None:
        nonlocal image, boxes
        width, height = image.size
        image = F.resize(image, [short_side], max_size=long_side)
        boxes = boxes * torch.tensor([image.width / width, image.height / height] * 2)

    if training and random.random() < CONFIG.flip_probability:
        image = F.hflip(image)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([image.width, 0, image.width, 0])
    if training and random.random() < 0.5:
        resize(random.choice(CONFIG.crop_resize_short_sides), None)
        low, high = CONFIG.crop_sizes
        width, height = random.randint(low, min(image.width, high)), random.randint(low, min(image.height, high))
        top, left = random.randint(0, image.height - height), random.randint(0, image.width - width)
        image = F.crop(image, top, left, height, width)
        boxes = clip(boxes - torch.tensor([left, top, left, top]), height, width)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    resize(random.choice(CONFIG.short_sides) if training else CONFIG.validation_short_side, CONFIG.long_side)
    pixels = F.normalize(F.to_tensor(image), list(IMAGE_MEAN), list(IMAGE_STD))
    return pixels, xyxy_to_cxcywh(boxes / torch.tensor([image.width, image.height] * 2))


def milliseconds(run: Callable[[], Iterator[int]]) -> float:
    start = time.process_time()
    images = sum(run())
    return (time.process_time() - start) / images * 1e3


class Made(IterableDataset[Any]):
    """Batches that cost nothing to make but to write them, from a worker process."""

    def __init__(self, batch: Callable[[], Any]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return (self.batch() for _ in range(BATCHES))


def packed_batch(boxes: int) -> Any:
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    sample = Sample(image, torch.zeros(boxes, 4), torch.zeros(boxes, dtype=torch.int64), 1, (480, 640))
    return collate([sample] * BATCH_SIZE)


def published_batch(boxes: int) -> Any:
    images = torch.zeros(BATCH_SIZE, 3, HEIGHT, WIDTH)
    target = {name: torch.zeros(boxes) for name in ("labels", "area", "iscrowd")}
    target |= {name: torch.zeros(2) for name in ("image_id", "orig_size", "size")}
    targets = [{name: tensor.clone() for name, tensor in target.items()} for _ in range(BATCH_SIZE)]
    for own in targets:
        own["boxes"] = torch.zeros(boxes, 4)
    return images, torch.zeros(BATCH_SIZE, HEIGHT, WIDTH, dtype=torch.bool), targets


def tensors_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return 1
    if is_dataclass(value):
        return sum(tensors_in(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(map(tensors_in, value.values()))
    return sum(map(tensors_in, value)) if isinstance(value, (list, tuple)) else 0


def hand_over(batch: Callable[[], Any]) -> float:
    """Milliseconds of CPU time a batch, in the worker and here, making it included."""
    before = time.process_time(), _of_children()
    for _ in DataLoader(Made(batch), batch_size=None, num_workers=1):
        pass
    return (time.process_time() - before[0] + _of_children() - before[1]) / BATCHES * 1e3


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--images", type=int, default=64, dest="count", help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = CocoDetection(str(arguments.images), str(arguments.annotations))
    with tempfile.TemporaryDirectory() as folder:
        index = pack(arguments.annotations, arguments.images, Path(folder), workers=0)
        # No more than the first shard holds, and whole batches.
        count = min(arguments.count, len(index.shards[0].samples)) // BATCH_SIZE * BATCH_SIZE
        cases = {
            "training": (lambda: ours_training(index, count), lambda: baseline(dataset, count, True)),
            "evaluation": (lambda: ours_evaluation(index, count), lambda: baseline(dataset, count, False)),
        }
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {count} images a round")
        print("| stream | ms/image, minimum (median) | CocoDetection | ratio of minima |\n| --- | --- | --- | --- |")
        for name, (ours, theirs) in cases.items():
            times = [(milliseconds(ours), milliseconds(theirs)) for _ in range(arguments.rounds)]
            print(f"| {name} | {row(times)} |")
        padding = [1 - batch.sizes.prod(-1).sum() / batch.padding_mask.numel() for batch in training_batches(index)]
        print(f"padding in {len(padding)} batches of {BATCH_SIZE}: {100 * statistics.mean(map(float, padding)):.1f} %")
    print(f"\nbatches of {BATCH_SIZE} images of {HEIGHT} x {WIDTH} pixels, {os.cpu_count()} cores")
    print("| boxes an image | tensors | ms/batch, minimum (median) | published: tensors | ms/batch | ratio of minima |")
    print("| --- " * 6 + "|")
    for boxes in (4, 114):
        ours, theirs = partial(packed_batch, boxes), partial(published_batch, boxes)
        times = [(hand_over(ours), hand_over(theirs)) for _ in range(arguments.rounds)]
        mine, other, ratio = row(times).split(" | ")
        print(f"| {boxes} | {tensors_in(ours())} | {mine} | {tensors_in(theirs())} | {other} | {ratio} |")


def row(times: list[tuple[float, float]]) -> str:
    mine, other = zip(*times, strict=True)
    shown = [f"{min(values):.1f} ({statistics.median(values):.1f})" for values in (mine, other)]
    return f"{shown[0]} | {shown[1]} | {min(mine) / min(other):.2f}"


if __name__ == "__main__":
    main()
