"""`ddetr checkpoint ...`: the commands' arguments and help. The work is done in the module each imports."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import CheckpointPath, Overrides

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into a checkpoint, or write it in another format.")


@checkpoint_app.command("inspect")
def checkpoint_inspect(path: CheckpointPath) -> None:
    """Print what a checkpoint holds: step, size of each part, categories, scores if it was evaluated, configuration."""
    from .checkpoint import inspect

    inspect(path)


@checkpoint_app.command("export")
def checkpoint_export(
    path: CheckpointPath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    overrides: Overrides = None,
    format: Annotated[
        Literal["safetensors", "published", "onnx"],
        typer.Option(help="`published` is the layout of the paper's code; `onnx` needs the extra `ddetr[export]`."),
    ] = "safetensors",
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="HEIGHT WIDTH",
            help="onnx: size of the images in pixels.  [default: a square of data.validation_short_side]",
        ),
    ] = None,
) -> None:
    """Write a checkpoint's weights in another format.

    Example: `ddetr checkpoint export runs/r50-0001 r50.pth --format published`
    """
    from .checkpoint import export

    export(path, output, format, image_size, overrides or ())
