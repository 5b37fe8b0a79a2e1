"""Packing: a COCO json and its images into indexed tar shards.

What a shard holds is decided before anything is written, from the json and the sizes of the files, so the bytes on
disk depend neither on the number of workers nor on interruptions. A shard gets its name when it is whole, together
with a sidecar that holds its part of the index; `index.json` is written last. Packing again skips what is whole.
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

from .coco import CocoImage, CocoSet, Finding, summary
from .config import MOST_PIXELS
from .documents import parse_json
from .formats import digest, read_annotations
from .images import SizeError, TooManyPixels, file_fault, image_suffix, load_image, read_file
from .index import ShardIndex, file_sha256, partial_path, tar_members, write_whole
from .layout import INDEX_NAME, MOST_INDEX_BYTES, SAMPLE_DTYPE, Shard, sample_key
from .parallel import ordered_map
from .text import visible

__all__ = ["ShardIndex", "pack"]

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


def pack(
    annotations: Path,
    images: Path,
    output: Path,
    *,
    workers: int,
    shard_bytes: int = 64 << 20,
    drop_degenerate: bool = False,
    allow_outside: bool = False,
    most_pixels: int = MOST_PIXELS,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write the images that a COCO json names, with their annotations, as shards of nearly equal size.

    annotations: the json, or a folder of Pascal VOC xml or YOLO txt files.
    shard_bytes: size that shards do not exceed by more than a sample. workers: processes, 0 for one per core. Every
    image is decoded once to be sure of it. allow_outside: images may lie outside `images`, by .., by a link or by an
    absolute name. most_pixels: an image that states more is an error.

    Raises ValueError, listing what is wrong, for a json with errors (boxes without area too, unless
    `drop_degenerate` leaves them out) and for missing or undecodable images; FileExistsError when `output` holds
    shards of another set. Until all is whole there is no index.json, so nothing half-made can be mistaken for data.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    coco = read_annotations(annotations, images, allow_outside=allow_outside, most_pixels=most_pixels)
    refused = [f for f in coco.findings if f.severity == "error" and not (drop_degenerate and _is_droppable(f))]
    refused += file_findings(coco, images, allow_outside).values()
    if refused:
        raise ValueError(f"{annotations}: nothing was packed, {len(refused)} error(s):\n{summary(refused)}")
    jobs = plan_shards(coco, images, output, shard_bytes)
    finished = _finished_shards(output, jobs)
    output.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("packing", total=len(coco.images)) if progress else None
    findings: list[Finding] = []
    todo = [job for job in jobs if job.path not in finished]
    if progress and task is not None:
        progress.advance(task, len(coco.images) - sum(len(job.images) for job in todo))
    for job, result in zip(
        todo, ordered_map(partial(write_shard, most_pixels=most_pixels), todo, workers=workers), strict=True
    ):
        if isinstance(result, Shard):
            finished[job.path] = result
        else:
            findings += result
        if progress and task is not None:
            progress.advance(task, len(job.images))
    if findings:
        raise ValueError(
            f"{images}: {len(findings)} error(s), so there is no {INDEX_NAME}; the shards without errors are kept for "
            f"the next try:\n{summary(findings)}"
        )
    source = {
        "annotations": annotations.name,
        "annotations_sha256": digest(annotations),
        "images": len(coco.images),
        "boxes": sum(len(image.annotations) for image in coco.images),
        "dropped_boxes": sum(_is_droppable(finding) for finding in coco.findings),
    }
    index = ShardIndex(output, coco.categories, source, [finished[job.path] for job in jobs])
    index.save()
    partials = [path for path in output.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for leftover in [*(job.sidecar for job in jobs), *partials]:
        leftover.unlink(missing_ok=True)
    return ShardIndex.load(output)


def file_findings(coco: CocoSet, folder: Path, allow_outside: bool) -> dict[int, Finding]:
    """Image id -> why its file is not to be read; nothing is opened."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the images that the json names")
    resolved = folder.resolve()
    faults = ((image, file_fault(resolved, image.file_name, allow_outside=allow_outside)) for image in coco.images)
    return {image.image_id: Finding(fault[0], f"image {image.image_id}", fault[1]) for image, fault in faults if fault}


def plan_shards(coco: CocoSet, folder: Path, output: Path, shard_bytes: int) -> list[ShardJob]:
    """Divide the images into shards of nearly equal size.

    Images are dealt in the order of a digest of their ids: a fixed order without any trace of how the data was
    collected, so that neighbours in a shard are no more alike than any two images.
    """
    images = sorted(coco.images, key=lambda image: hashlib.sha256(image.key.encode()).digest())
    files = [folder / image.file_name for image in images]
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


def write_shard(job: ShardJob, most_pixels: int = MOST_PIXELS) -> Shard | list[Finding]:
    """Write one shard and its sidecar, or return what is wrong with its images and leave nothing."""
    findings: list[Finding] = []
    checksums: dict[int, tuple[int, int]] = {}
    unfinished = partial_path(job.path)
    try:
        # mtime 0, fixed owner and mode: equal content gives equal bytes.
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:
            with TarWriter(file, encoder=False, mtime=0.0) as tar:
                for image, path in zip(job.images, job.files, strict=True):
                    finding, suffix, data = inspect_file(image, path, most_pixels)
                    if finding:
                        findings.append(finding)
                        continue
                    entry = _sample_json(image)
                    tar.write({"__key__": image.key, suffix: data, "json": entry})
                    checksums[image.image_id] = zlib.crc32(data), zlib.crc32(entry)
            file.flush()
            os.fsync(file.fileno())
        if findings:
            return findings
        shard = replace(_describe(job, unfinished, checksums), path=job.path)
        write_whole(job.sidecar, json.dumps(shard.to_json()).encode())  # first: a shard without it is somebody else's
        unfinished.rename(job.path)
        return shard
    finally:
        unfinished.unlink(missing_ok=True)


def inspect_file(image: CocoImage, path: Path, most_pixels: int) -> tuple[Finding | None, str, bytes]:
    """`inspect_image` of a file, and its bytes; none where it cannot be read."""
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:
        return Finding("undecodable image", f"image {image.image_id} ({image.file_name})", str(error)), "", b""
    return *inspect_image(image, data, most_pixels), data


def inspect_image(image: CocoImage, data: bytes, most_pixels: int) -> tuple[Finding | None, str]:
    """Decode an image file as the stream will. Returns (what is wrong or None, the file's suffix in the shard)."""
    where = f"image {image.image_id} ({image.file_name})"
    try:
        load_image(data, most_pixels=most_pixels, stated=(image.height, image.width))
        return None, image_suffix(data, most_pixels)
    except TooManyPixels as error:
        return Finding("too large image", where, str(error)), ""
    except SizeError as error:
        return Finding("wrong size", where, str(error)), ""
    except ValueError as error:
        return Finding("undecodable image", where, str(error)), ""


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
                f"{output}: already holds shards of other images, annotations or shard size; "
                "choose another folder or delete this one"
            )
    for job in jobs:
        if job.path not in known and job.sidecar.is_file():
            known[job.path] = _read_sidecar(job)
        elif job.path not in known and os.path.lexists(job.path):
            raise FileExistsError(
                f"{job.path}: a shard that nothing says to be of this set, and that would be overwritten; "
                "choose another folder or delete it"
            )
    return {
        job.path: shard
        for job in jobs
        if (shard := known.get(job.path)) is not None
        and shard.fingerprint == job.fingerprint
        and job.path.is_file()
        and file_sha256(job.path) == shard.sha256
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
            "folder or delete it"
        ) from error
