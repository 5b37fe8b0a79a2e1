"""AdamW with the published parameter groups, and the learning rate as a function of the step (appendix A.4)."""

import torch
from torch import nn

from .config import OptimConfig

SLOW = ("sampling_offsets", "reference_points")
LINEAR_SHARE = 0.4  # of the run, in which the linear schedule falls


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The trained parameters in three groups: base, backbone and sampling, each with its own rate under "scale".

    A group without parameters is left out. `lr` holds the rate at full strength.
    """
    named: dict[str, list[nn.Parameter]] = {"base": [], "backbone": [], "sampling": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            named["backbone"].append(parameter)
        elif any(part in name.split(".") for part in SLOW):
            named["sampling"].append(parameter)
        else:
            named["base"].append(parameter)
    scales = {"base": 1.0, "backbone": config.backbone_multiplier, "sampling": config.sampling_multiplier}
    return [
        {"name": name, "params": parameters, "scale": scales[name], "lr": config.learning_rate * scales[name]}
        for name, parameters in named.items()
        if parameters
    ]


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, last_step: int) -> float:
    """The base group's rate at optimizer step `step`, from 0, of `last_step`.

    Linear warm-up; then, as published, a tenth after each drop epoch, or a straight line down to zero at the end.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "linear":
        return config.learning_rate * warm * min(1.0, (last_step - step) / (LINEAR_SHARE * last_step))
    drops = sum(step >= epoch * steps_per_epoch for epoch in config.drop_epochs)
    return config.learning_rate * warm * 0.1**drops


def rate_advice(config: OptimConfig, batch_size: int) -> str | None:
    """What to set when the learning rate is meant for another batch size, by the linear rule (Goyal et al., 2017)."""
    if batch_size == config.learning_rate_batch_size:
        return None
    scaled = config.learning_rate * batch_size / config.learning_rate_batch_size
    return (
        f"optim.learning_rate={config.learning_rate:g} is meant for {config.learning_rate_batch_size} images per step, "
        f"train.batch_size is {batch_size}; by the linear rule set optim.learning_rate={scaled:.3g}, and in any case "
        f"optim.learning_rate_batch_size={batch_size} when the rate is right"
    )
