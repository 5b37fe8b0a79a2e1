"""`ddetr config` and `ddetr model`: arguments and help. The work is done in the module each imports."""

from typing import Annotated

import typer

from .arguments import CONFIGURATION, names_and_overrides


def config(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=CONFIGURATION,
            show_default=False,
            help="Presets, YAML files and run directories, each on top of those before it, then settings.",
        ),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="KEY", help="Say what this setting means, or each setting of this section.")
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Print what differs between two presets, files or run directories."),
    ] = None,
) -> None:
    """Show settings: the resolved configuration as YAML, what one means, what differs. Alone it lists the presets.

    Exit status 1 when `--diff` finds differences. All settings: docs/settings.md.

    Examples:

    `ddetr config r50_two_stage mine.yaml train.epochs=12 > all.yaml`

    `ddetr config r50 --explain optim.clip_norm`

    `ddetr config --diff r50 runs/mine`
    """
    from . import config as shown

    names, overrides = names_and_overrides(arguments)
    if diff is not None:
        if arguments or explain is not None:
            raise ValueError("--diff compares two configurations, A and B, and takes nothing else")
        raise typer.Exit(shown.differences(*diff))
    if explain is not None:
        shown.explain(explain, names, overrides)
    elif names:
        shown.show(names, overrides)
    elif overrides:
        raise ValueError("name a preset or a YAML file before the settings, e.g. `ddetr config tiny`")
    else:
        shown.list_presets()


def model(
    arguments: Annotated[
        list[str], typer.Argument(metavar=CONFIGURATION, help="Presets and YAML files, then settings, as for `train`.")
    ],
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="HEIGHT WIDTH",
            help="Size of the image in pixels.  [default: 800 1120, the mean of COCO's images at evaluation]",
        ),
    ] = None,
) -> None:
    """Print what a model costs: parameters and GFLOPs (multiply-adds of one image) of each of its parts.

    Examples:

    `ddetr model r50_two_stage`

    `ddetr model r50 model.encoder_layers=3 --image-size 480 640`
    """
    from ..core.config import load

    names, overrides = names_and_overrides(arguments)
    if not names:
        raise ValueError("name a preset or a YAML file, e.g. `ddetr model r50`")
    config = load(names, overrides, acts=("model.backbone",))

    from .model import model as print_costs  # only now: a misspelt key need not wait for torch

    print_costs(config, image_size)
