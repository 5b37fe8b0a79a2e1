"""A batch of images with their boxes, packed into one tensor of bytes.

Shapes: N images, H and W the largest height and width in the batch, T boxes of all images together.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .shared_memory import shared

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
NOTHING_SIDE = 64  # pixels of an empty image


@dataclass(frozen=True)
class Sample:
    """One transformed image with its objects, before batching; without an image id it fills a place and trains nothing.

    image: (3, h, w) uint8 RGB. boxes_cxcywh: (t, 4) float32, relative to the image, in [0, 1].
    labels: (t,) int64 in 0..K-1. original_size: (height, width) in pixels of the file as stored.
    """

    image: Tensor
    boxes_cxcywh: Tensor
    labels: Tensor
    image_id: int | None
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """N images padded at the right and bottom to one size; the boxes of all images one after another."""

    images: Tensor  # (N, 3, H, W) uint8, zero on padding
    sizes: Tensor  # (N, 2) int64, (height, width) of each image without its padding
    boxes_cxcywh: Tensor  # (T, 4) float32, each relative to its own unpadded image
    labels: Tensor  # (T,) int64
    num_boxes: Tensor  # (N,) int64, how many of the T rows belong to each image
    image_ids: Tensor  # (N,) int64; -1 for an image that only fills a place
    original_sizes: Tensor  # (N, 2) int64, (height, width) in pixels
    is_real: Tensor  # (N,) bool, whether the image carries a loss
    bad_samples: tuple[str, ...] = ()  # replaced by images without a loss: shard, key and what is wrong

    @functools.cached_property
    def padding_mask(self) -> Tensor:
        """(N, H, W) bool, True on padding; made where the images are."""
        height, width = self.images.shape[-2:]
        below = torch.arange(height, device=self.images.device) >= self.sizes[:, :1]
        beside = torch.arange(width, device=self.images.device) >= self.sizes[:, 1:]
        return below[:, :, None] | beside[:, None, :]

    def to(self, device: torch.device) -> "Batch":
        """Images, sizes, boxes, labels, is_real on `device`; the others stay on the host, which needs them.

        Copies from pinned memory do not block.
        """
        moved = ("images", "sizes", "boxes_cxcywh", "labels", "is_real")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})


@dataclass(frozen=True)
class PackedBatch:
    """A batch as it leaves a loader worker, in one tensor: each tensor costs a file descriptor and a mapping."""

    packed: Tensor  # (bytes,) uint8: the batch's tensors one after another
    shape: tuple[int, int, int, int]  # N, H, W, T
    bad_samples: tuple[str, ...]

    def pin_memory(self) -> "PackedBatch":
        return replace(self, packed=self.packed.pin_memory())

    def batch(self) -> Batch:
        """The batch, whose tensors are views of these bytes."""
        start, tensors = 0, {}
        for name, (dtype, shape) in layout(*self.shape).items():
            end = start + dtype.itemsize * math.prod(shape)
            tensors[name] = self.packed[start:end].view(dtype).view(shape)
            start = end
        return Batch(**tensors, bad_samples=self.bad_samples)


def layout(n: int, h: int, w: int, t: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a packed batch in their order; wide types first, so that each begins at a multiple of its own."""
    return {
        "labels": (torch.int64, (t,)),
        "num_boxes": (torch.int64, (n,)),
        "image_ids": (torch.int64, (n,)),
        "original_sizes": (torch.int64, (n, 2)),
        "sizes": (torch.int64, (n, 2)),
        "boxes_cxcywh": (torch.float32, (t, 4)),
        "images": (torch.uint8, (n, 3, h, w)),
        "is_real": (torch.bool, (n,)),
    }


def packed_bytes(n: int, h: int, w: int, t: int) -> int:
    """Bytes of a packed batch of N images of H x W pixels with T boxes."""
    return sum(dtype.itemsize * math.prod(extent) for dtype, extent in layout(n, h, w, t).values())


def nothing() -> Sample:
    """An empty image that fills a place."""
    image = torch.zeros(3, NOTHING_SIDE, NOTHING_SIDE, dtype=torch.uint8)
    return Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None, (NOTHING_SIDE, NOTHING_SIDE))


def collate(samples: Sequence[Sample], bad_samples: Sequence[str] = ()) -> PackedBatch:
    """Pad the samples' images to one size and pack them with their boxes.

    Raises ValueError for an empty sequence, SharedMemoryError in a worker process that finds too little of it.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    height = max(sample.image.shape[1] for sample in samples)
    width = max(sample.image.shape[2] for sample in samples)
    shape = (len(samples), height, width, sum(len(sample.labels) for sample in samples))
    packed = PackedBatch(_bytes(packed_bytes(*shape)), shape, tuple(bad_samples))
    batch = packed.batch()
    for n, sample in enumerate(samples):
        h, w = sample.image.shape[1:]
        batch.images[n, :, :h, :w] = sample.image
        batch.images[n, :, h:] = 0
        batch.images[n, :, :h, w:] = 0
    torch.cat([sample.boxes_cxcywh for sample in samples], out=batch.boxes_cxcywh)
    torch.cat([sample.labels for sample in samples], out=batch.labels)
    batch.sizes[:] = torch.tensor([sample.image.shape[1:] for sample in samples])
    batch.num_boxes[:] = torch.tensor([len(sample.labels) for sample in samples])
    batch.image_ids[:] = torch.tensor([-1 if sample.image_id is None else sample.image_id for sample in samples])
    batch.original_sizes[:] = torch.tensor([sample.original_size for sample in samples])
    batch.is_real[:] = torch.tensor([sample.image_id is not None for sample in samples])
    return packed


def _bytes(number: int) -> Tensor:
    """Uninitialised; in a worker process in shared memory at once, where handing over would have to copy it."""
    if get_worker_info() is None:
        return torch.empty(number, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(shared(number))


def normalised(images: Tensor, padding_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (N, 3, H, W) scaled to zero mean and unit deviation over ImageNet, zero on padding."""
    mean, scale = _statistics_on_gpu(images.device) if images.is_cuda else _statistics(images.device)
    return (images.float().sub_(mean).mul_(scale)).masked_fill_(padding_mask[:, None], 0.0).to(dtype)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGE_MEAN, device=device).mul(255).view(1, 3, 1, 1)
    return mean, torch.tensor(IMAGE_STD, device=device).mul(255).reciprocal().view(1, 3, 1, 1)


_statistics_on_gpu = functools.cache(_statistics)  # copied once: each copy makes the host wait
