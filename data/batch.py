"""A batch of images with their boxes, packed into a handful of tensors.

Shapes: N images, H and W the largest height and width in the batch, T boxes of all images together.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


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
    padding_mask: Tensor  # (N, H, W) bool, True on padding
    boxes_cxcywh: Tensor  # (T, 4) float32, each relative to its own unpadded image
    labels: Tensor  # (T,) int64
    num_boxes: Tensor  # (N,) int64, how many of the T rows belong to each image
    image_ids: Tensor  # (N,) int64; -1 for an image that only fills a place
    original_sizes: Tensor  # (N, 2) int64, (height, width) in pixels
    is_real: Tensor  # (N,) bool, whether the image carries a loss
    bad_samples: tuple[str, ...] = ()  # in whose places there are images without one: shard, key and what is wrong

    def to(self, device: torch.device) -> "Batch":
        """Images, mask, boxes, labels, is_real on `device`; counts, ids and sizes stay on the host, which needs them.

        Copies from pinned memory do not block.
        """
        moved = ("images", "padding_mask", "boxes_cxcywh", "labels", "is_real")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})

    def pin_memory(self) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "bad_samples"}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


def nothing() -> Sample:
    """An empty image that fills a place."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    return Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None, (64, 64))


def collate(samples: Sequence[Sample], bad_samples: Sequence[str] = ()) -> Batch:
    """Pad the samples' images to one size and pack their boxes.

    Raises ValueError for an empty sequence.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    height = max(sample.image.shape[1] for sample in samples)
    width = max(sample.image.shape[2] for sample in samples)
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for n, sample in enumerate(samples):
        h, w = sample.image.shape[1:]
        images[n, :, :h, :w] = sample.image
        padding_mask[n, :h, :w] = False
    return Batch(
        images=images,
        padding_mask=padding_mask,
        boxes_cxcywh=torch.cat([sample.boxes_cxcywh for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        num_boxes=torch.tensor([len(sample.labels) for sample in samples]),
        image_ids=torch.tensor([-1 if sample.image_id is None else sample.image_id for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        is_real=torch.tensor([sample.image_id is not None for sample in samples]),
        bad_samples=tuple(bad_samples),
    )


def normalised(images: Tensor, padding_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (N, 3, H, W) scaled to zero mean and unit deviation over ImageNet, zero on padding."""
    mean, scale = _statistics_on_gpu(images.device) if images.is_cuda else _statistics(images.device)
    return (images.float().sub_(mean).mul_(scale)).masked_fill_(padding_mask[:, None], 0.0).to(dtype)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGE_MEAN, device=device).mul(255).view(1, 3, 1, 1)
    return mean, torch.tensor(IMAGE_STD, device=device).mul(255).reciprocal().view(1, 3, 1, 1)


_statistics_on_gpu = functools.cache(_statistics)  # copied once: each copy makes the host wait
