"""AdamW with the published parameter groups and learning rates (section 5, implementation details)."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Config, OptimConfig

SLOW = ("sampling_offsets", "reference_points")
# Learning rate and images per step with which the published results of each architecture were made.
PUBLISHED_RATES = {"deformable_detr": (2e-4, 32), "detr": (1e-4, 64)}


def freeze_without_rate(model: nn.Module, config: OptimConfig) -> None:
    """Freeze the backbone if optim.backbone_multiplier=0: no gradient, no moments, no share in the gradient norm."""
    if config.backbone_multiplier == 0:
        for name, parameter in model.named_parameters():
            if name.startswith("backbone."):
                parameter.requires_grad_(False)


def check_trained(trained: Collection[str], stored: Collection[str], checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint's optimizer state is of the parameters that train now."""
    if set(trained) == set(stored):
        return
    lacking, idle = set(trained) - set(stored), set(stored) - set(trained)
    differing = lacking | idle
    back = ""
    if all(name.startswith("backbone.") for name in differing):
        back = "if optim.backbone_multiplier was changed to or from 0, change it back; or "
    raise ValueError(
        f"{checkpoint}: its optimizer state is of other parameters: {len(lacking)} that train now have none and "
        f"{len(idle)} that have some do not train, such as {min(differing)}; {back}start from its weights instead: "
        f"train.initial_weights={checkpoint}"
    )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The trained parameters in three groups: base, backbone and sampling, each with its own learning rate.

    `scale` is the group's factor on the base rate, `lr` the rate after warm-up and before any drop. A group without
    parameters is left out.
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
    """Fused AdamW over `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def state_of(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of a float32 weight: "step", and the moments by name, each of the weight's shape.

    Before the first step it is made as AdamW makes it: zeros for the first moment (exp_avg) and the second
    (exp_avg_sq).
    """
    state = optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state |= {
            slot: torch.zeros_like(master, memory_format=torch.preserve_format) for slot in ("exp_avg", "exp_avg_sq")
        }
    return state


def rate_advice(config: Config) -> str | None:
    """A warning when the learning rate is off by more than a factor of 2 from the linear scaling rule; otherwise None.

    The rule (Goyal et al., 2017) scales the published rate with the batch size. None as well for a backbone trained
    from scratch, for which no rate is published.
    """
    if config.model.backbone_norm == "group":
        return None
    rate, images = PUBLISHED_RATES[config.model.architecture]
    fitting = rate * config.train.batch_size / images
    if 0.5 <= config.optim.learning_rate / fitting <= 2:
        return None
    return (
        f"optim.learning_rate={config.optim.learning_rate:g} with train.batch_size={config.train.batch_size}: "
        f"published is {rate:g} for {images} images per step, so by the linear rule {fitting:.3g} fits; set "
        f"optim.learning_rate={fitting:.3g}, unless this is meant"
    )
