"""A trial step on a small image before a run, so that what cannot be built or trained fails now and not after hours."""

import time
from dataclasses import dataclass

import torch

from ...data.batch import Sample, collate
from ..config import Config
from ..model.detector import build
from .engine import Engine
from .optimizer import freeze_without_rate
from .step import train_step
from .world import World

SIDE = 128  # pixels of the image


@dataclass(frozen=True)
class Trial:
    """loss: of a model with random weights. seconds: of the step. trained, frozen: how many parameters."""

    loss: float
    seconds: float
    trained: int
    frozen: int


def try_step(config: Config, world: World) -> Trial:
    """Build model and engine as a run does, without pretrained weights, and take a step on one image per rank.

    Collective. Raises what building, DeepSpeed or the step raises, and FloatingPointError when the step was skipped
    because a number was not finite; not in fp16, where skipped steps are how loss scaling finds its factor.
    """
    model_config = config.model.model_copy(update={"pretrained_backbone": False})
    train_config = config.train.model_copy(update={"batch_size": world.size, "accumulation": 1})
    small = config.model_copy(update={"model": model_config, "train": train_config})
    torch.manual_seed(config.train.seed)
    model = build(model_config)
    freeze_without_rate(model, config.optim)
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    engine = Engine(model.train(), small, world)
    engine.set_learning_rate(config.optim.learning_rate)
    image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
    sample = Sample(image, torch.tensor([[0.5, 0.5, 0.4, 0.4]]), torch.zeros(1, dtype=torch.int64), 0, (SIDE, SIDE))
    began = time.perf_counter()
    step = train_step(engine, [collate([sample]).batch()], 1, small, world, stop=False)
    assert step is not None, "nobody asked to stop"
    loss = float(world.sum(step.losses.sum())) / world.size
    if not step.taken and config.train.precision != "fp16":
        raise FloatingPointError(f"a step on one small image is not finite: its loss is {loss}, or a gradient is not")
    return Trial(loss, time.perf_counter() - began, trained, frozen)
