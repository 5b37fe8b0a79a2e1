"""CPU time per image of the streams against torchvision's CocoDetection with the published chain of transforms.

    python benchmarks/stream.py COCO_JSON IMAGES [--images 64] [--rounds 3]

Both decode the same files with PIL and end in a padded batch. The baseline follows the published code: files opened
one by one, PIL resize, crop and resize again, float tensors normalised on the host. The clock is this process's CPU
time, one thread, no workers; the two take turns, so that a busy machine slows both.
"""

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ddetr.data.batch import IMAGE_MEAN, IMAGE_STD
from ddetr.data.boxes import clip, xywh_to_xyxy, xyxy_to_cxcywh
from ddetr.data.config import DataConfig
from ddetr.data.shards import ShardIndex, pack
from ddetr.data.stream import TrainStream, evaluation_batches
from torch import Tensor
from torchvision.datasets import CocoDetection
from torchvision.transforms import functional as F

BATCH_SIZE = 4
CONFIG = DataConfig.model_validate({"workers": 0})


def ours_training(index: ShardIndex, count: int) -> Iterator[int]:
    stream = TrainStream(index, CONFIG, batch_size=BATCH_SIZE, accumulation=1, rank=0, world_size=1, seed=0)
    for (batch,) in islice(stream.steps(0), count // BATCH_SIZE):
        yield len(batch.image_ids)


def ours_evaluation(index: ShardIndex, count: int) -> Iterator[int]:
    for batch in islice(evaluation_batches(index, 0, CONFIG, batch_size=BATCH_SIZE), count // BATCH_SIZE):
        yield len(batch.image_ids)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--images", type=int, default=64, dest="count", help="per round")
    parser.add_argument("--rounds", type=int, default=3)
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
        print("| stream | ms/image | CocoDetection ms/image | ratio |\n| --- | --- | --- | --- |")
        for name, (ours, theirs) in cases.items():
            times = [(milliseconds(ours), milliseconds(theirs)) for _ in range(arguments.rounds)]
            mine, other = (statistics.median(values) for values in zip(*times, strict=True))
            print(f"| {name} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |")


if __name__ == "__main__":
    main()
