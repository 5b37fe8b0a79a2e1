"""Checks of a data set before training on it: a COCO json with its images, or a folder of shards.

Everything found is returned; only what cannot be read at all raises. `Finding` says what and where, `findings.FIXES`
what to do about it.
"""

import hashlib
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.progress import Progress

from .annotations import box_fault
from .config import MOST_PIXELS
from .files import file_sha256
from .findings import Finding
from .formats import EVERYTHING, read_annotations
from .index import SampleError, ShardIndex, ShardReader, tar_members
from .inspection import inspect_file, inspect_image
from .layout import Shard
from .parallel import ordered_map
from .protocols import IMAGE_LISTS
from .sets import CocoImage, CocoSet, Reading

Digest = tuple[str, bytes]  # where an image is, and the digest of its bytes


def check_coco(
    annotations: Path,
    images: Path,
    *,
    reading: Reading = EVERYTHING,
    progress: Progress | None = None,
) -> list[Finding]:
    """All that is wrong with annotations (`read_annotations`) and their images: `check_set` of the one set there."""
    coco = read_annotations(annotations, images, reading, progress=progress)
    return check_set(coco, workers=reading.workers, most_pixels=reading.most_pixels, progress=progress)


def check_set(
    coco: CocoSet, *, workers: int = 0, most_pixels: int = MOST_PIXELS, progress: Progress | None = None
) -> list[Finding]:
    """What was found when the set was read, and what is wrong with its images, each of which is decoded."""
    findings = list(coco.findings)
    task = progress.add_task("checking images", total=len(coco.images)) if progress else None
    digests = []
    check = partial(_check_file, coco.folder, most_pixels)
    for finding, digest in ordered_map(check, coco.images, workers=workers, chunk=16):
        findings += [finding] if finding else []
        digests += [digest] if digest else []
        if progress and task is not None:
            progress.advance(task)
    return findings + _duplicates(digests)


def check_shards(
    folder: Path, *, workers: int = 0, most_pixels: int = MOST_PIXELS, progress: Progress | None = None
) -> list[Finding]:
    """All that is wrong with a folder of shards: files against the index, checksums, images, boxes, duplicates.

    Raises FileNotFoundError without folder or index, ValueError for an unusable index.
    """
    index = ShardIndex.read(folder)
    findings = [Finding("extra shard", name, "not in the index") for name in index.extra_shards()]
    findings += [Finding("no boxes", str(folder), index.lack, "warning")] if index.lack else []
    numbers = []
    for number, shard in enumerate(index.shards):
        if shard.path.is_file():
            numbers.append(number)
        else:
            findings.append(Finding("missing shard", shard.name, "named in the index, but not there"))
    task = progress.add_task("checking samples", total=index.num_samples) if progress else None
    digests: list[Digest] = []
    for number, (some, more) in zip(
        numbers, ordered_map(partial(_check_shard, index, most_pixels), numbers, workers=workers), strict=True
    ):
        findings += some
        digests += more
        if progress and task is not None:
            progress.advance(task, len(index.shards[number].samples))
    return findings + _duplicate_keys(index.shards) + _duplicates(digests)


def _check_file(folder: Path, most_pixels: int, image: CocoImage) -> tuple[Finding | None, Digest | None]:
    finding, _, data = inspect_file(image, folder / image.file_name, most_pixels)
    return finding, (image.where, _digest(data)) if data else None


def _check_shard(index: ShardIndex, most_pixels: int, number: int) -> tuple[list[Finding], list[Digest]]:
    shard = index.shards[number]
    findings = _check_bytes(shard)
    digests: list[Digest] = []
    reader = ShardReader(index)
    for row in range(len(shard.samples)):
        where = f"{shard.name}, sample {shard.key(row)}"
        try:
            data, entry = reader.image(number, row), reader.annotations(number, row)
        except SampleError as error:
            findings.append(Finding("wrong bytes", where, str(error).partition(": sample ")[2]))
            continue
        image = CocoImage(**entry)
        finding = inspect_image(image, data, most_pixels)[0]
        findings += [replace(finding, where=where)] if finding else []
        digests.append((where, _digest(data)))
        indexed = tuple(int(shard.samples[row][name]) for name in ("image_id", "height", "width", "num_boxes"))
        stored = (image.image_id, image.height, image.width, len(image.annotations))
        if indexed != stored:
            what = f"(id, height, width, boxes) is {indexed} in the index, {stored} in the shard"
            findings.append(Finding("wrong bytes", where, what))
        for name in IMAGE_LISTS:
            if unknown := [id_ for id_ in getattr(image, name) or [] if id_ not in index.categories]:
                findings.append(Finding("unknown category", where, f"{name} lists {unknown[:5]}"))
        for annotation in image.annotations:
            place = f"{where}, annotation {annotation['id']}"
            fault = box_fault(annotation["bbox"], image.height, image.width)
            if fault:
                severity = "warning" if fault[0] == "overhanging box" else "error"
                findings.append(Finding(fault[0], place, fault[1], severity))
            if annotation["category_id"] not in index.categories:
                findings.append(Finding("unknown category", place, f"category_id {annotation['category_id']}"))
    reader.close()
    return findings, digests


def _check_bytes(shard: Shard) -> list[Finding]:
    size = shard.path.stat().st_size
    if size != shard.bytes:
        return [Finding("wrong bytes", shard.name, f"{size} bytes instead of {shard.bytes}")]
    findings = []
    if file_sha256(shard.path) != shard.sha256:
        findings.append(Finding("wrong bytes", shard.name, "its sha256 is not the one in the index"))
    try:
        keys = list(tar_members(shard.path))
    except tarfile.TarError as error:
        return [*findings, Finding("wrong bytes", shard.name, f"not a readable tar: {error}")]
    if keys != [shard.key(row) for row in range(len(shard.samples))]:
        findings.append(Finding("wrong bytes", shard.name, "its samples are not those of the index"))
    return findings


def _duplicate_keys(shards: Iterable[Shard]) -> list[Finding]:
    findings = []
    first: dict[str, str] = {}
    for shard in shards:
        for row in range(len(shard.samples)):
            key = shard.key(row)
            if key in first:
                findings.append(Finding("duplicate id", f"{shard.name}, sample {key}", f"also in {first[key]}"))
            first.setdefault(key, shard.name)
    return findings


def _duplicates(digests: Iterable[Digest]) -> list[Finding]:
    findings = []
    first: dict[bytes, str] = {}
    for where, digest in digests:
        if digest in first:
            findings.append(Finding("duplicate content", where, f"the same bytes as {first[digest]}", "warning"))
        first.setdefault(digest, where)
    return findings


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
