"""`ddetr model`: what a detector costs, part by part."""

from dataclasses import replace

from rich.table import Column, Table
from rich.text import Text

from ..core.config import Config
from ..core.model.cost import IMAGE_SIZE, Cost, costs
from .console import Terminal


def model(config: Config, image_size: tuple[int, int] | None = None) -> None:
    """Print parameters and GFLOPs of each part of the model and of all, for one image of (height, width) pixels.

    Without weights and without a download. Raises what `costs` raises.
    """
    height, width = image_size or IMAGE_SIZE
    parts = costs(config.model, (height, width))
    if config.optim.backbone_multiplier == 0:
        backbone = parts["backbone"]
        parts["backbone"] = replace(backbone, num_trained=0, num_frozen=backbone.num_trained + backbone.num_frozen)
    total = sum(parts.values(), Cost(0, 0, 0))
    table = Table(
        "part",
        *(
            Column(Text(head), justify="right")
            for head in ("trained\n(parameters)", "frozen\n(parameters)", "compute\n(GFLOPs)", "share\n(%)")
        ),
        title=f"{config.model.architecture}, {config.model.backbone}, {config.model.num_classes} classes, one image of "
        f"{height} x {width} pixels",
        title_justify="left",
        caption="GFLOPs as the paper counts them: 10^9 multiply-adds of one forward pass",
        caption_justify="left",
    )
    for title, cost in parts.items():
        table.add_row(title, *_numbers(cost, total))
    table.add_section()
    table.add_row("total", *_numbers(total, total))
    Terminal(soft_wrap=True).print(table)


def _numbers(cost: Cost, total: Cost) -> list[str]:
    percent = 100 * cost.num_multiply_adds / total.num_multiply_adds
    return [
        f"{cost.num_trained:,}",
        f"{cost.num_frozen:,}",
        f"{cost.num_multiply_adds / 1e9:,.3f}",
        f"{percent:.1f}",
    ]
