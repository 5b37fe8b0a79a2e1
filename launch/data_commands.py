"""`ddetr data ...`: the commands' arguments and help. The work is done in the module each imports."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Overrides

AllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside",
        help="Read images outside IMAGES too, where file_name has .. or is absolute, or a link leads.",
    ),
]
MostPixels = Annotated[
    int,
    typer.Option(
        min=1, max=2_000_000_000, help="Of an image as its header states it; more is an error. As data.most_pixels."
    ),
]

data_app = typer.Typer(no_args_is_help=True, help="Turn COCO-format data into shards; check it, make it, look at it.")


@data_app.command("pack")
def data_pack(
    annotations: Annotated[
        Path, typer.Argument(metavar="COCO_JSON", help="COCO json; or a folder of VOC or YOLO files.")
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of the images that it names.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards and their index.json.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and write.")] = 2,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of one shard, in MiB.")] = 64,
    drop_degenerate: Annotated[
        bool, typer.Option("--drop-degenerate", help="Leave out boxes without area instead of stopping at them.")
    ] = False,
    allow_outside: AllowOutside = False,
    most_pixels: MostPixels = 250_000_000,
) -> None:
    """Pack COCO json and images into indexed tar shards, in parallel.

    Run it again after an interruption and it goes on; finished shards are kept.

    Example: `ddetr data pack instances_train2017.json train2017/ shards/train --workers 8`
    """
    from .data import pack

    pack(annotations, images, output, workers, shard_megabytes, drop_degenerate, allow_outside, most_pixels)


@data_app.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder of shards; or what `pack` takes.")],
    images: Annotated[
        Path | None, typer.Argument(metavar="IMAGES", help="With annotations: the folder of their images.")
    ] = None,
    allow_outside: AllowOutside = False,
    most_pixels: MostPixels = 250_000_000,
) -> None:
    """Find bad boxes, missing or broken images, unknown categories and duplicates, and say which.

    Exit status 1 when something is wrong.

    Examples: `ddetr data check instances_val2017.json val2017/`, `ddetr data check shards/val`
    """
    from .data import check

    if not check(path, images, allow_outside, most_pixels):
        raise typer.Exit(1)


@data_app.command("synth")
def data_synth(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Gets annotations.json and images/.")],
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1000,
    size: Annotated[int, typer.Option(min=32, help="Longer side of an image, in pixels.")] = 128,
    classes: Annotated[int, typer.Option(min=1, help="Number of object classes.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same set.")] = 0,
) -> None:
    """Draw a procedural detection set in COCO format: textured backgrounds, overlapping, small and crowd objects.

    Example: `ddetr data synth datasets/demo --images 2000 --size 128`
    """
    from .data import synth

    synth(output, images, size, classes, seed)


@data_app.command("show")
def data_show(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder written by `ddetr data pack`.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.png", help="The picture to write.")],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 16,
    preset: Annotated[str, typer.Option(metavar="PRESET_OR_FILE", help="Whose augmentation to apply.")] = "tiny",
) -> None:
    """Draw training samples with their boxes, after augmentation, as the detector sees them.

    Example: `ddetr data show shards/train samples.png --preset r50 data.crop=false`
    """
    from ..core.config import load
    from .data import show

    show(shards, output, count, load(preset, overrides or ()))


@data_app.command("stats")
def data_stats(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder written by `ddetr data pack`.")],
    overrides: Overrides = None,
    preset: Annotated[str, typer.Option(metavar="PRESET_OR_FILE", help="Whose settings to hold against it.")] = "r50",
    ranks: Annotated[int, typer.Option(min=1, help="Processes that will train; a batch is divided among them.")] = 1,
) -> None:
    """Print a set's images, objects by class and size, aspect ratios and padding, and which settings to change.

    Example: `ddetr data stats shards/train --preset r50_two_stage --ranks 8 train.batch_size=32`
    """
    from ..core.config import load
    from .statistics import stats

    stats(shards, load(preset, overrides or ()), ranks)
