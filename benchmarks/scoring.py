"""How long scoring takes, and its memory: hotcoco, as in `ddetr eval`, beside pycocotools and vernier.

    python benchmarks/scoring.py [--images 1000 5000] [--classes 80] [--runs 5] [--scorers hotcoco pycocotools]

Synthetic objects, 7 an image as in COCO, and 100 detections an image, 40 of them near an object. Each scorer has a
process of its own, and gets columns as an evaluation holds them, shard after shard; time includes all that it needs to
make of them, memory is the process's peak without the columns. `--processes N` divides the images among N tallies
whose bytes are added up, as ranks do; then the time is that of the slowest and of adding up. vernier is no requirement
of ddetr: pip install vernier.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from ddetr.core.evaluation.coco import coco_tally
from ddetr.core.evaluation.columns import DETECTION_DTYPE
from ddetr.data.categories import Categories
from ddetr.data.truth import ANNOTATION_DTYPE, GroundTruth

SHARD_IMAGES, DETECTIONS, SIDE = 500, 100, 640


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--scorers", nargs="+", default=["hotcoco", "pycocotools"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        scorer, images, processes = arguments.measure
        print(json.dumps(measured(scorer, int(images), arguments.classes, int(processes))))
        return
    print(f"{arguments.classes} classes, {DETECTIONS} detections an image, {arguments.runs} runs")
    print("| images | scorer | min, s | median, s | of the first | peak memory, GiB | AP |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for images in arguments.images:
        runs = {scorer: [run(scorer, images, arguments) for _ in range(arguments.runs)] for scorer in arguments.scorers}
        first = min(found["seconds"] for found in runs[arguments.scorers[0]])
        for scorer, found in runs.items():
            seconds = [each["seconds"] for each in found]
            memory = max(each["bytes"] for each in found) / 2**30
            ratio = f"{min(seconds) / first:.1f}"
            row = [images, scorer, f"{min(seconds):.2f}", f"{statistics.median(seconds):.2f}", ratio, f"{memory:.2f}"]
            print("|", " | ".join(map(str, [*row, repr(found[0]["AP"])])), "|", flush=True)


def run(scorer: str, images: int, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--classes", str(arguments.classes), "--measure", scorer, str(images)]
    done = subprocess.run([*command, str(arguments.processes)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measured(scorer: str, images: int, classes: int, processes: int) -> dict[str, Any]:
    shards = [drawn(first, min(SHARD_IMAGES, images - first), classes) for first in range(0, images, SHARD_IMAGES)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    score = by_vernier if scorer == "vernier" else by_ddetr
    seconds, ap = score(scorer, shards, images, classes, processes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": peak - before, "AP": ap}


def by_ddetr(
    scorer: Any, shards: list[tuple[GroundTruth, np.ndarray]], images: int, classes: int, processes: int
) -> tuple[float, float]:
    categories = Categories(tuple(range(1, classes + 1)), tuple(map(str, range(classes))))
    image_ids = np.arange(images)
    first, sent, slowest = coco_tally(image_ids, categories, scorer), [], 0.0
    for number in range(processes):
        tally = coco_tally(image_ids, categories, scorer) if number else first
        began = time.perf_counter()
        for truth, detections in shards[number::processes]:
            tally.add(truth, detections)
        sent += [tally.to_bytes()] if number else []
        slowest = max(slowest, time.perf_counter() - began)
    began = time.perf_counter()
    if sent:
        first.merge(sent)
    scores = first.scores()
    return slowest + time.perf_counter() - began, scores["AP"]


def by_vernier(
    scorer: str, shards: list[tuple[GroundTruth, np.ndarray]], images: int, classes: int, processes: int
) -> tuple[float, float]:
    from vernier._core import CocoDataset, evaluate_bbox_grid  # pyright: ignore[reportMissingImports]

    began = time.perf_counter()
    rows = np.concatenate([truth.annotations for truth, _ in shards])
    found = np.concatenate([detections for _, detections in shards])
    side = np.full(images, SIDE)
    annotations = {
        name: np.ascontiguousarray(rows[name]) for name in ("image_id", "category_id", "bbox", "area", "iscrowd")
    }
    annotations["id"] = np.arange(1, len(rows) + 1)
    categories = [{"id": number + 1, "name": str(number)} for number in range(classes)]
    truth = CocoDataset.from_arrays({"id": np.arange(images), "width": side, "height": side}, annotations, categories)
    table = np.column_stack([found["image_id"], found["bbox"], found["score"], found["category_id"]]).astype(float)
    grid = evaluate_bbox_grid(truth, table, parity_mode="strict", max_dets_per_image=100, use_cats=True)
    scores = grid.accumulate([1, 10, 100]).summarize().stats
    return time.perf_counter() - began, scores[0]


def drawn(first: int, count: int, classes: int) -> tuple[GroundTruth, np.ndarray]:
    """Images `first`, `first` + 1, ...: their objects and detections; the frequencies of classes fall by a power."""
    random = np.random.default_rng(first)
    frequency = np.arange(1, classes + 1) ** -0.8
    frequency /= frequency.sum()
    objects = random.poisson(7.4, count)
    rows = np.zeros(objects.sum(), dtype=ANNOTATION_DTYPE)
    rows["id"] = np.arange(len(rows)) + first * 1000
    rows["image_id"] = np.repeat(np.arange(first, first + count), objects)
    rows["category_id"] = random.choice(classes, len(rows), p=frequency) + 1
    rows["bbox"] = boxes(len(rows), random)
    rows["area"] = rows["bbox"][:, 2] * rows["bbox"][:, 3] * random.uniform(0.4, 1, len(rows))
    rows["iscrowd"] = random.random(len(rows)) < 0.01
    found = np.zeros(count * DETECTIONS, dtype=DETECTION_DTYPE)
    image = np.repeat(np.arange(count), DETECTIONS)
    near = (random.random(len(found)) < 0.4) & (objects[image] > 0)
    chosen = (np.cumsum(objects) - objects)[image[near]] + (random.random(near.sum()) * objects[image[near]]).astype(
        int
    )
    found["image_id"], found["bbox"] = image + first, boxes(len(found), random)
    found["bbox"][near] = rows["bbox"][chosen] * np.exp(random.normal(0, 0.08, (near.sum(), 4)))
    found["category_id"] = random.choice(classes, len(found), p=frequency) + 1
    right = random.random(near.sum()) < 0.85
    found["category_id"][np.flatnonzero(near)[right]] = rows["category_id"][chosen[right]]
    found["score"] = np.where(near, random.beta(3, 2, len(found)), random.beta(1, 8, len(found)))
    return GroundTruth([{"id": number} for number in range(first, first + count)], rows), found


def boxes(count: int, random: np.random.Generator) -> np.ndarray:
    sides = np.exp(random.normal(4, 1, (count, 2))).clip(4, 400)
    return np.concatenate([random.uniform(0, 1, (count, 2)) * (SIDE - sides), sides], axis=1)


if __name__ == "__main__":
    main()
