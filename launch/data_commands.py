"""`ddetr data ...`: the commands' arguments and help. The work is done in the module each imports."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import Overrides

ACTS = ("model.backbone", "data.most_pixels")  # the privileged settings that these commands use
OrientationName = Literal["stored", "shown"]
ProtocolName = Literal["coco", "lvis", "openimages"]
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
Renumber = Annotated[
    bool, typer.Option("--renumber", help="Give all annotations new ids, where some are repeated or missing.")
]
Orientation = Annotated[
    OrientationName | None,
    typer.Option(
        help="What boxes refer to where EXIF turns an image and its size does not decide: the pixels as they are "
        "stored, or the picture as it is shown."
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The classes of VOC or YOLO files: names in a text file or a data.yaml; a COCO json; a folder of shards.",
    ),
]
Split = Annotated[str | None, typer.Option(help="Which split of an export's root to read (default: all of them).")]
Protocol = Annotated[
    ProtocolName | None,
    typer.Option(
        help="How detections in the set are scored, kept with the shards (default: by what the annotations hold)."
    ),
]

data_app = typer.Typer(
    no_args_is_help=True, help="Turn annotated images into shards; check them, make them, look at them."
)


@data_app.command("pack")
def data_pack(
    annotations: Annotated[
        Path,
        typer.Argument(
            metavar="ANNOTATIONS",
            help="COCO or LVIS json; the CSV of Open Images' boxes; a folder of VOC or YOLO files; an export's root.",
        ),
    ],
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="[IMAGES] OUT",
            help="Folder of the images, where the layout does not name it; folder for the shards and their index.json.",
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and write.")] = 2,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of one shard, in MiB.")] = 64,
    drop_degenerate: Annotated[
        bool, typer.Option("--drop-degenerate", help="Leave out boxes without area instead of stopping at them.")
    ] = False,
    allow_outside: AllowOutside = False,
    most_pixels: MostPixels = 250_000_000,
    renumber: Renumber = False,
    orientation: Orientation = None,
    classes: Classes = None,
    split: Split = None,
    protocol: Protocol = None,
) -> None:
    """Pack annotations and images into indexed tar shards, in parallel.

    Run it again after an interruption and it continues; finished shards are kept. The splits of an export's root come
    into folders of OUT.

    Examples: `ddetr data pack instances_train2017.json train2017/ shards/train --workers 8`,
    `ddetr data pack roboflow_export/ shards/`
    """
    from ..data.sets import Reading
    from .data import pack

    if len(places) > 2:
        raise ValueError(f"{len(places)} folders after {annotations}: needs at most two, IMAGES and OUT")
    pack(
        annotations,
        places[0] if len(places) == 2 else None,
        places[-1],
        workers=workers,
        shard_megabytes=shard_megabytes,
        drop_degenerate=drop_degenerate,
        reading=Reading(allow_outside, most_pixels, renumber, orientation, classes, protocol=protocol),
        split=split,
    )


@data_app.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder of shards; or what `pack` takes.")],
    images: Annotated[
        Path | None, typer.Argument(metavar="[IMAGES]", help="The images' folder, where the layout does not name it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read; 0: one a core.")] = 0,
    allow_outside: AllowOutside = False,
    most_pixels: MostPixels = 250_000_000,
    renumber: Renumber = False,
    orientation: Orientation = None,
    classes: Classes = None,
    split: Split = None,
    protocol: Protocol = None,
) -> None:
    """Find bad boxes, missing or broken images, unknown categories and duplicates, and say which.

    Exit status 1 when something is wrong.

    Examples: `ddetr data check instances_val2017.json val2017/`, `ddetr data check shards/val`
    """
    from ..data.sets import Reading
    from .data import check

    reading = Reading(allow_outside, most_pixels, renumber, orientation, classes, protocol=protocol)
    if not check(path, images, workers=workers, reading=reading, split=split):
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
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PRESET_OR_FILE",
            show_default=False,
            help="Whose augmentation to apply; may be given several times, later ones win.  [default: tiny]",
        ),
    ] = None,
) -> None:
    """Draw training samples with their boxes, after augmentation, as the detector sees them.

    Example: `ddetr data show shards/train samples.png --preset r50 data.crop=false`
    """
    from ..core.config import load
    from .data import show

    show(shards, output, count, load(preset or "tiny", overrides or (), acts=ACTS))


@data_app.command("stats")
def data_stats(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder written by `ddetr data pack`.")],
    overrides: Overrides = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PRESET_OR_FILE",
            show_default=False,
            help="Whose settings to hold against it; may be given several times, later ones win.  [default: r50]",
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that will train; a batch is divided among them.")] = 1,
) -> None:
    """Print a set's images, objects by class and size, aspect ratios and padding, and which settings to change.

    Example: `ddetr data stats shards/train --preset r50_two_stage --ranks 8 train.batch_size=32`
    """
    from ..core.config import load
    from .statistics import stats

    stats(shards, load(preset or "r50", overrides or (), acts=ACTS), ranks)
