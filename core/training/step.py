"""One optimizer step: gradient accumulation over micro-batches, then AdamW; and the diagnosis of a skipped step.

All random numbers of step s on rank r are a function of (seed, s, r), so a checkpoint needs no generator state.
"""

import math
import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...data.batch import Batch, normalised
from ...data.splitmix import step_seed
from ..config import Config
from ..model.criterion import criterion
from ..model.finite import finite_or_poison, first_not_finite
from .engine import Engine
from .world import World


@dataclass(frozen=True)
class Step:
    """What one optimizer step did on this rank."""

    losses: Tensor  # (parts, layers) weighted losses of the rank's share; their mean over ranks is the whole batch's
    errors: Tensor  # (2,) the last layer's class error in percent, and cardinality error in objects per image
    num_images: Tensor  # () how many images of all ranks carried a loss
    parts: tuple[str, ...]
    layers: tuple[str, ...]
    taken: bool  # False: skipped on all ranks, because a gradient of some rank was not finite
    compute_seconds: float  # of this rank's forward passes and losses


def train_step(
    engine: Engine, micro_batches: list[Batch], number: int, config: Config, world: World, stop: bool
) -> Step | None:
    """Take optimizer step `number`, from 1: forward, losses and backward of each micro-batch, then AdamW. Collective.

    Returns None without a step when some rank asks to `stop`; the micro-batches of that rank may be missing.
    Losses are normalised by the number of objects of the whole step, so gradients are those of the global batch. In
    forward and losses the host waits for the device once per micro-batch, for the matching. DeepSpeed's step waits
    as well, for the gradient norm.
    """
    totals = torch.tensor([0.0, 0.0, 0.0, float(stop)])
    for batch in micro_batches:
        counts = batch.num_boxes
        totals[:3] += torch.stack([counts.sum(), counts.clamp(max=config.model.queries).sum(), batch.is_real.sum()])
    objects, matched, images, stops = world.sum(totals)
    if stops:
        return None
    _seed(config.train.seed, number - 1, world.rank)
    shares = world.size * len(micro_batches)
    all_losses, taken, compute_seconds = [], True, 0.0
    for batch in micro_batches:
        began = time.perf_counter()
        batch = batch.to(world.device)
        pixels = normalised(batch.images, batch.padding_mask, engine.dtype)
        predictions = engine.run(pixels, batch.padding_mask)
        losses = criterion(predictions, batch, config.optim, objects, shares, matched, images)
        compute_seconds += time.perf_counter() - began
        engine.run.backward(finite_or_poison(losses.weighted(config.optim).sum()))  # divided by their number in there
        taken &= engine.step(number)  # takes effect after the last micro-batch
        all_losses.append(losses)
    weighted = torch.stack([losses.weighted(config.optim).detach() for losses in all_losses]).mean(0)
    last = losses.layers.index(predictions.decoder[-1].name)
    errors = [torch.stack([losses.class_error, losses.cardinality_error[last]]) for losses in all_losses]
    return Step(weighted, torch.stack(errors).mean(0), images, losses.parts, losses.layers, taken, compute_seconds)


def diagnosis(
    engine: Engine, micro_batches: list[Batch], losses: list[float], step: int, config: Config, world: World
) -> str:
    """Say where the numbers of a skipped step stopped being finite, on which ranks and images. Collective.

    losses: means over the ranks. The forward pass is repeated: its weights and random numbers are those of the step.
    """
    if all(math.isfinite(value) for value in losses):
        return "every loss is finite, a gradient is not" + (" (the loss scale)" if engine.loss_scale != 1 else "")
    mine: list[str] = []
    _seed(config.train.seed, step - 1, world.rank)
    for batch in micro_batches:
        batch = batch.to(world.device)
        module = cast(nn.Module, engine.run.module)
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), first_not_finite(module) as found:
            module(normalised(batch.images, batch.padding_mask, engine.dtype), batch.padding_mask)
        if found:
            mine.append(f"first in {found[0]} on rank {world.rank}, images {batch.image_ids.tolist()}")
    return "; ".join(world.gather(mine, str)) or "the losses are not finite, every module's output is"


def _seed(seed: int, step: int, rank: int) -> None:
    """Seed dropout for this step."""
    torch.manual_seed(step_seed(seed, step, rank))
