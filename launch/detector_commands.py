"""`ddetr eval`, `ddetr predict` and `ddetr explain`: what is done with a trained detector, and their arguments."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import CHECKPOINTS, ON_RAY, OVERRIDES, CheckpointPath, Overrides, RayAddress, is_override


def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar=f"CHECKPOINT... {OVERRIDES}",
            show_default=False,
            help=f"{CHECKPOINTS}. Several are compared. Then settings to change.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="Shards to evaluate on: a folder, http(s)://..., s3://... or pipe:COMMAND; given again, on each.  "
            "[default: the run's data.validation, of several the first one's]",
        ),
    ] = None,
    ray: RayAddress = None,
    submit: Annotated[
        bool,
        typer.Option(
            "--submit",
            rich_help_panel=ON_RAY,
            help="Submit it as a job of the cluster, print the job's id and return.",
        ),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", rich_help_panel=ON_RAY, help="With --submit: print the job's output, and fail where it fails."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go.  [default: the run's eval/ folder]")
    ] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all", help="Evaluate every checkpoint of the run, not only the newest.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Evaluate each new checkpoint of runs in progress, until these have finished."),
    ] = False,
    idle: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="MINUTES", help="With --follow: end after so long without a new checkpoint.  [default: 60]"
        ),
    ] = None,
) -> None:
    """Compute the scores of the set's protocol: COCO's twelve numbers, LVIS' thirteen, or Open Images' AP.

    Batch size and number of workers do not change them. A damaged image is left out and named.

    Also where the detector fails: kinds of errors, classes, confusions and the worst images, as json, csv and pictures.
    With several checkpoints, each difference of AP has the interval within which it is noise of the choice of images.

    Examples:

    `ddetr eval runs/r50-0001`

    `ddetr eval r50_deformable_detr.pth --data shards/val --ray 10.0.0.1:6379`

    `ddetr eval runs/r50-0001 --data s3://bucket/val`

    `ddetr eval runs/r50-0001 runs/r50-0002 --data shards/val --output compared`

    `ddetr eval runs/r50-0001 --follow --ray 10.0.0.1:6379`

    `ddetr eval runs/r50-0001 --data shards/val --data shards/test --ray 10.0.0.1:6379 --submit`
    """
    paths = [Path(argument) for argument in checkpoints if not is_override(argument)]
    overrides = [argument for argument in checkpoints if is_override(argument)]
    if not paths:
        raise ValueError("name a checkpoint or a run directory")
    if idle is not None and not follow:
        raise ValueError("--idle: only with --follow")
    sets = data or []
    if wait and not submit:
        raise ValueError("--wait: only with --submit")
    if follow:
        if output is not None or all_checkpoints:
            raise ValueError(
                "--follow writes into the runs' eval/ folders and takes every checkpoint: leave out --output and --all"
            )
    elif len(paths) > 1 and (all_checkpoints or len(sets) > 1):
        given = "--all takes one run" if all_checkpoints else "several --data take one checkpoint or run"
        raise ValueError(f"{given}; to compare, name the checkpoints and one set")
    if submit:
        if ray is None:
            raise ValueError("--submit needs the address of a Ray cluster: --ray HOST:PORT")
        from .jobs import submit as submit_job

        options = ["--follow"] * follow + ["--all"] * all_checkpoints
        options += [] if idle is None else [f"--idle={idle:g}"]
        options += [] if output is None else [f"--output={output.resolve()}"]
        submit_job(paths, overrides, sets, options, ray, wait=wait)
    elif follow:
        from .follow import follow as follow_runs

        follow_runs(paths, overrides, sets, ray, **({} if idle is None else {"idle_minutes": idle}))
    elif len(paths) == 1:
        from .evaluate import evaluate as evaluate_checkpoint

        evaluate_checkpoint(paths[0], overrides, sets, ray, output, all_checkpoints=all_checkpoints)
    else:
        from .comparison import compare

        compare(paths, overrides, sets[0] if sets else None, ray, output)


def predict(
    checkpoint: CheckpointPath,
    images: Annotated[list[str], typer.Argument(metavar=f"IMAGE... {OVERRIDES}", help="Image files or folders.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Gets the JSON and the drawn images.")] = Path(
        "predictions"
    ),
) -> None:
    """Detect objects in images: boxes as JSON (pixels, original category ids) and drawn.

    Example: `ddetr predict runs/tiny-0001 photos/*.jpg --output found eval.score_threshold=0.5`
    """
    from .predict import predict as predict_images

    files = [argument for argument in images if not is_override(argument)]
    overrides = [argument for argument in images if is_override(argument)]
    if not files:
        raise ValueError("name at least one image")
    predict_images(checkpoint, [Path(file) for file in files], output, overrides)


def explain(
    checkpoint: CheckpointPath,
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("explanation.png"),
    query: Annotated[
        int | None, typer.Option(min=0, help="Object query to explain.  [default: the most confident one]")
    ] = None,
) -> None:
    """Draw where one object query looked: its sampling points, coloured by attention weight, on the image.

    Example: `ddetr explain runs/tiny-0001 photo.jpg --output why.png --query 7`
    """
    from .explain import explain as explain_query

    explain_query(checkpoint, image, output, query, overrides or ())
