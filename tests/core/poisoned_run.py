"""`ddetr train` in which the pixels of image POISONED_IMAGE are not numbers once they are normalised."""

import os

import torch
from ddetr.core.training import step
from ddetr.launch.cli import main

if __name__ == "__main__":
    poisoned = int(os.environ["POISONED_IMAGE"])
    to, normalised = step.Batch.to, step.normalised
    batches: list[step.Batch] = []

    def remembered(batch: step.Batch, device: torch.device) -> step.Batch:
        batches.append(to(batch, device))
        return batches[-1]

    def with_poison(images: torch.Tensor, padding_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        pixels = normalised(images, padding_mask, dtype)
        pixels[batches[-1].image_ids == poisoned] = torch.nan
        return pixels

    step.Batch.to = remembered
    step.normalised = with_poison
    main()
