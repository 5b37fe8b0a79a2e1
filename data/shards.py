"""Packing: annotations and their images into indexed tar shards.

What a shard holds is decided before anything is written, from annotations and the headers and sizes of the files. So
the bytes on disk depend neither on the number of workers nor on interruptions. A shard gets its name when it is whole,
together with a sidecar that holds its part of the index; `index.json` is written last. Packing again skips what is
whole.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from webdataset.writer import TarWriter

from .config import MOST_PIXELS
from .documents import parse_json
from .files import file_sha256, unfinished, write_whole
from .findings import Finding, summary
from .formats import EVERYTHING, digest, read_annotations
from .images import read_file
from .index import ShardIndex, tar_members
from .inspection import inspect_file
from .layout import INDEX_NAME, MOST_INDEX_BYTES, SAMPLE_DTYPE, Shard, sample_key
from .parallel import ordered_map
from .protocols import IMAGE_LISTS
from .sets import CocoImage, CocoSet, Reading
from .text import visible

__all__ = ["ShardIndex", "pack", "pack_set"]

DEFAULT_SHARD_BYTES = 64 << 20

_LEFTOVER = re.compile(r"\.(shard-[0-9]{6,}\.(tar|json)|index\.json)\.[0-9]+\.partial")  # of a pack that was killed


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its path and its images, each with its file."""

    path: Path
    images: list[CocoImage]
    files: list[Path]
    fingerprint: str

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")


@dataclass(frozen=True)
class Packed:
    """The shards written, and the warnings about the set that they are made from."""

    index: ShardIndex
    warnings: list[Finding]


def pack(
    annotations: Path,
    images: Path,
    output: Path,
    *,
    workers: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    drop_degenerate: bool = False,
    reading: Reading = EVERYTHING,
    progress: Progress | None = None,
) -> ShardIndex:
    """Pack the images that annotations name, and the annotations, into shards of nearly equal size: `pack_set` of one.

    annotations: a COCO json, or a folder of Pascal VOC xml or YOLO txt files. Raises as `read_annotations` and
    `pack_set`.
    """
    coco = read_annotations(annotations, images, replace(reading, workers=workers), progress=progress)
    packed = pack_set(
        coco,
        output,
        workers=workers,
        shard_bytes=shard_bytes,
        drop_degenerate=drop_degenerate,
        most_pixels=reading.most_pixels,
        progress=progress,
    )
    return packed.index


def pack_set(
    coco: CocoSet,
    output: Path,
    *,
    workers: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    drop_degenerate: bool = False,
    most_pixels: int = MOST_PIXELS,
    progress: Progress | None = None,
) -> Packed:
    """Write a set as shards of nearly equal size.

    shard_bytes: size that shards do not exceed by more than a sample. workers: processes, 0 for one per core. Every
    image is decoded once to be sure of it. most_pixels: an image that states more is an error.

    Raises ValueError, listing what is wrong, for a set with errors and for undecodable images. A box without area is an
    error, unless `drop_degenerate` leaves it out, which it does not with all boxes of a class. Raises FileExistsError
    when `output` holds shards of another set. Until all is whole there is no index.json, so nothing half-made can be
    mistaken for data.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    if output.resolve() in (coco.folder.resolve(), coco.path.resolve()):
        raise ValueError(
            f"{output}: holds the images or annotations that are to be packed; choose another folder for OUT"
        )
    refused = [f for f in coco.findings if f.severity == "error" and not (drop_degenerate and _is_droppable(f))]
    refused += _lost_classes(coco) if drop_degenerate else []
    if refused or not coco.images:
        raise ValueError(f"{coco.path}: nothing was packed, {len(refused)} error(s):\n{summary(refused)}")
    warnings = [finding for finding in coco.findings if finding.severity == "warning"]
    jobs = plan_shards(coco, output, shard_bytes)
    finished = _finished_shards(output, jobs)
    output.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("packing", total=len(coco.images)) if progress else None
    findings: list[Finding] = []
    todo = [job for job in jobs if job.path not in finished]
    if progress and task is not None:
        progress.advance(task, len(coco.images) - sum(len(job.images) for job in todo))
    for job, (shard, found) in zip(
        todo, ordered_map(partial(write_shard, most_pixels=most_pixels), todo, workers=workers), strict=True
    ):
        if shard is not None:
            finished[job.path] = shard
        findings += [finding for finding in found if finding.severity == "error"]
        warnings += [finding for finding in found if finding.severity == "warning"]
        if progress and task is not None:
            progress.advance(task, len(job.images))
    if findings:
        raise ValueError(
            f"{coco.folder}: {len(findings)} error(s), so there is no {INDEX_NAME}; the shards without errors are kept "
            f"for the next try:\n{summary(findings)}"
        )
    source = {
        "annotations": coco.path.name,
        "annotations_sha256": digest(coco.path),
        "images": len(coco.images),
        "boxes": sum(len(image.annotations) for image in coco.images),
        "crowds": sum(annotation["iscrowd"] for image in coco.images for annotation in image.annotations),
        "dropped_boxes": sum(coco.without_area.values()),
    }
    index = ShardIndex(output, coco.categories, source, [finished[job.path] for job in jobs], coco.protocol)
    index.save()
    partials = [path for path in output.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for leftover in [*(job.sidecar for job in jobs), *partials]:
        leftover.unlink(missing_ok=True)
    return Packed(ShardIndex.load(output), warnings)


def _lost_classes(coco: CocoSet) -> list[Finding]:
    """Classes that would have no box left without those that have no area."""
    kept = {annotation["category_id"] for image in coco.images for annotation in image.annotations}
    names = dict(zip(coco.categories.ids, coco.categories.names, strict=True))
    return [
        Finding("lost boxes", f"category {names[category_id]}", f"none of its {count} boxes has an area")
        for category_id, count in sorted(coco.without_area.items())
        if count and category_id not in kept
    ]


def plan_shards(coco: CocoSet, output: Path, shard_bytes: int) -> list[ShardJob]:
    """Divide the images into shards of nearly equal size.

    Images are dealt in the order of a digest of their ids: a fixed order without any trace of how the data was
    collected. So neighbours in a shard are no more alike than any two images.
    """
    images = sorted(coco.images, key=lambda image: hashlib.sha256(image.key.encode()).digest())
    files = [coco.folder / image.file_name for image in images]
    file_sizes = [file.stat().st_size for file in files]
    samples = [_sample_json(image) for image in images]
    # In a tar each member takes a header of 512 bytes and whole blocks of 512.
    sizes = np.array([1024 + _blocks(f) + _blocks(len(s)) for f, s in zip(file_sizes, samples, strict=True)])
    num_shards = -(-int(sizes.sum()) // shard_bytes)
    # An image belongs to the shard in whose share of the total its middle byte lies.
    shard_of_image = (sizes.cumsum() - sizes / 2) * num_shards // sizes.sum()
    jobs = []
    for number, shard in enumerate(np.unique(shard_of_image)):
        chosen = np.flatnonzero(shard_of_image == shard).tolist()
        made_from = [(file_sizes[i], samples[i].decode()) for i in chosen]
        jobs.append(
            ShardJob(
                path=output / f"shard-{number:06d}.tar",
                images=[images[i] for i in chosen],
                files=[files[i] for i in chosen],
                fingerprint=hashlib.sha256(json.dumps(made_from).encode()).hexdigest(),
            )
        )
    return jobs


def write_shard(job: ShardJob, most_pixels: int = MOST_PIXELS) -> tuple[Shard | None, list[Finding]]:
    """Write one shard and its sidecar; returns it with findings about its images, or None if one of them is bad."""
    findings: list[Finding] = []
    checksums: dict[int, tuple[int, int]] = {}
    with unfinished(job.path) as tar_file:
        # mtime 0, fixed owner and mode: equal content gives equal bytes.
        with tar_file.open("xb") as file, TarWriter(file, encoder=False, mtime=0.0) as tar:
            for image, path in zip(job.images, job.files, strict=True):
                finding, suffix, data = inspect_file(image, path, most_pixels)
                findings += [finding] if finding else []
                if suffix is None:
                    continue
                entry = _sample_json(image)
                tar.write({"__key__": image.key, suffix: data, "json": entry})
                checksums[image.image_id] = zlib.crc32(data), zlib.crc32(entry)
        if len(checksums) < len(job.images):
            tar_file.unlink()
            return None, findings
        shard = replace(_describe(job, tar_file, checksums), path=job.path)
        write_whole(job.sidecar, json.dumps(shard.to_json()).encode())  # first: a shard without it is somebody else's
    return shard, findings


def _is_droppable(finding: Finding) -> bool:
    return finding.kind == "degenerate box"


def _blocks(size: int) -> int:
    return -(-size // 512) * 512


def _sample_json(image: CocoImage) -> bytes:
    values: dict[str, Any] = {
        "image_id": image.image_id,
        "file_name": image.file_name,
        "height": image.height,
        "width": image.width,
        "annotations": image.annotations,
        **({} if image.orientation == 1 else {"orientation": image.orientation}),
        **{name: ids for name in IMAGE_LISTS if (ids := getattr(image, name)) is not None},
    }
    return json.dumps(values, separators=(",", ":")).encode()


def _describe(job: ShardJob, path: Path, checksums: dict[int, tuple[int, int]]) -> Shard:
    """The index entry of a tar just written, from the tar itself."""
    members = tar_members(path)
    rows = []
    for image in job.images:
        places = dict(members[sample_key(image.image_id)])
        annotations = places.pop("json")
        (pixels,) = places.values()
        counts = (image.image_id, image.height, image.width, len(image.annotations))
        rows.append((*counts, *pixels, *annotations, *checksums[image.image_id]))
    samples = np.array(rows, dtype=SAMPLE_DTYPE)
    return Shard(path, path.stat().st_size, file_sha256(path), job.fingerprint, samples)


def _finished_shards(output: Path, jobs: Sequence[ShardJob]) -> dict[Path, Shard]:
    """The shards that are whole and made from just this input. Raises FileExistsError for those of another set."""
    if not output.exists():
        return {}
    if not output.is_dir():
        raise FileExistsError(f"{output}: not a folder; choose another place for the shards")
    known: dict[Path, Shard] = {}
    if (output / INDEX_NAME).exists():
        known = {shard.path: shard for shard in ShardIndex.read(output).shards}
        if [shard.fingerprint for shard in known.values()] != [job.fingerprint for job in jobs]:
            raise FileExistsError(
                f"{output}: already holds shards of other images, annotations or shard size; choose another folder"
            )
    for job in jobs:
        if job.path not in known and job.sidecar.is_file():
            known[job.path] = _read_sidecar(job)
        elif job.path not in known and os.path.lexists(job.path):
            raise FileExistsError(
                f"{job.path}: a shard that nothing says to be of this set, and that would be overwritten; "
                "choose another folder"
            )
    own = [job for job in jobs if job.path in known and known[job.path].fingerprint == job.fingerprint]
    there = [path for path in known if path.is_file()]
    if there and not own:  # where some are its own, the others are from before an annotation was corrected
        raise FileExistsError(
            f"{output}: holds {len(there)} shards of another set that was not packed to its end; choose another "
            "folder, or move these away"
        )
    return {
        job.path: known[job.path]
        for job in own
        if job.path.is_file() and file_sha256(job.path) == known[job.path].sha256
    }


def _read_sidecar(job: ShardJob) -> Shard:
    try:
        shard = Shard.from_json(job.path.parent, parse_json(read_file(job.sidecar, MOST_INDEX_BYTES)))
        if shard.path != job.path:
            raise ValueError(f"it is of {shard.name}")
        return shard
    except ValueError as error:
        raise ValueError(
            f"{job.sidecar}: not what `ddetr data pack` notes beside a shard ({visible(str(error))}); choose another "
            "folder, or move this file away"
        ) from error
