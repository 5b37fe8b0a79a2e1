"""The command line `ddetr`: its commands, their arguments and help. The work is done in the module each imports.

Only typer and rich are imported here, so that `ddetr --help` is immediate and a misspelt option never waits for torch.
"""

import importlib.metadata
import io
import logging
import os
import sys
import traceback as traceback_module
from pathlib import Path
from typing import Annotated

import typer

from . import config_commands
from .arguments import (
    CHECKPOINTS,
    CONFIGURATION,
    OVERRIDES,
    CheckpointPath,
    Overrides,
    is_override,
    names_and_overrides,
    normalised_arguments,
)
from .checkpoint_commands import checkpoint_app
from .console import LogFormatter, paragraph, say
from .data_commands import data_app

app = typer.Typer(
    name="ddetr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train, evaluate and run Deformable DETR object detectors, on one CPU or on many GPU nodes.",
    epilog="`ddetr COMMAND --help` explains a command. Options may stand anywhere after the command.",
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")

ON_RAY = "On a Ray cluster"
# Variables that name folders in which torch and others make theirs, some as soon as they are imported.
FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCH_HOME", "HF_HOME", "TMPDIR")
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Ray cluster to use: `HOST:PORT`, `ray://HOST:PORT` or `auto`. Without an address a local Ray starts.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ddetr {importlib.metadata.version('ddetr')}")
        raise typer.Exit


@app.callback()
def _global_options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error, not only its message.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del traceback, version  # main() reads the first before typer parses; the second is done by its callback


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=CONFIGURATION,
            show_default=False,
            help="Presets (`ddetr config` lists them) and YAML files, each on top of those before it, then settings.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue this run from its newest complete checkpoint.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check data, settings and checkpoint, take a trial step on a small image, print the plan, and write "
            "nothing.",
        ),
    ] = False,
    continues: Annotated[
        bool,
        typer.Option(
            "--continues", help="Print whether this command, given again, continues its run (`true` or `false`); exit."
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            rich_help_panel=ON_RAY,
            help="Start all ranks on this Ray cluster: `HOST:PORT`, `ray://HOST:PORT` or `auto`. Without an address a "
            "local Ray starts. Shards and output must have the same path on every node.",
        ),
    ] = None,
    eval_ray: Annotated[
        str | None,
        typer.Option(
            "--eval-ray",
            metavar="ADDRESS",
            rich_help_panel=ON_RAY,
            help="Have this Ray cluster evaluate checkpoints while training goes on: `eval.ray=ADDRESS`.",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="N or MIN:MAX",
            rich_help_panel=ON_RAY,
            help="Ranks, each with a GPU of its own, or with an equal share of the CPUs where there are no GPUs. With "
            "a range as many as there is room for, counted again at every restart.  [default: one for each GPU or each "
            "node]",
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=ON_RAY,
            help="How often all ranks start again after one was lost, if `train.auto_resume=true`.  [default: 3]",
        ),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            rich_help_panel=ON_RAY,
            help="How long to wait for room in the cluster before giving up.  [default: 60]",
        ),
    ] = None,
) -> None:
    """Train. Alone it is one process; started by torchrun, deepspeed or Slurm it is one rank of many.

    Ctrl-C or SIGTERM saves a checkpoint and exits. Several ranks on one machine: `launch/local.sh`. On a Ray cluster:
    `--ray`.

    Examples:

    `ddetr train tiny data.train=shards/train data.validation=shards/val`

    `ddetr train r50 data.train=shards/train train.batch_size=16 optim.learning_rate=1e-4`

    `ddetr train r50_two_stage mine.yaml train.epochs=12`

    `ddetr train --resume runs/r50-0001`

    `ddetr train r50 data.train=shards/train train.name=r50 train.auto_resume=true`

    `ddetr train r50 data.train=/shared/train train.name=r50 train.auto_resume=true --ray 10.0.0.1:6379 --ranks 16`

    `ddetr train r50 data.train=/shared/train data.validation=/shared/val --eval-ray 10.0.0.1:6379`
    """
    from ..core.config import load
    from ..core.overrides import written

    on_ray = {"ranks": ranks, "restarts": restarts, "wait": wait}
    if ray is None and (given := [f"--{name}" for name, value in on_ray.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: only with --ray; ranks on this machine: launch/local.sh --ranks N")
    names, overrides = names_and_overrides(arguments)
    overrides += [] if eval_ray is None else [written("eval.ray", eval_ray)]
    if resume is not None and names:
        raise ValueError(f"--resume reads {resume}/config.yaml; leave out {' '.join(names)} (overrides may stay)")
    if resume is not None and not (resume / "config.yaml").is_file():
        raise FileNotFoundError(f"{resume}: not a run directory, it holds no config.yaml")
    if resume is None and not names:
        raise ValueError("name a preset or a YAML file, e.g. `ddetr train tiny`, or a run with --resume RUN_DIR")
    if resume is not None:  # where it is now, whatever its file says of where it was
        overrides += [written("train.output", str(resume.resolve().parent)), "train.auto_resume=false"]
    config = load(names if resume is None else resume / "config.yaml", overrides, of_run=resume is not None)
    if continues:
        print("true" if resume is not None or config.train.auto_resume else "false")
        return
    if ray is not None:
        from .ranks import train_on_ray

        options = {name: value for name, value in on_ray.items() if value is not None}
        raise typer.Exit(train_on_ray(config, ray, resume=resume, dry_run=dry_run, **options))

    from .train import run  # only now: a misspelt key need not wait for torch

    run(config, resume=resume, dry_run=dry_run)


app.command()(config_commands.config)
app.command()(config_commands.model)


@app.command("eval")
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


@app.command()
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


@app.command()
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


@app.command()
def tune(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Preset, fixed overrides and search space.")],
    ray: RayAddress = None,
) -> None:
    """Search hyperparameters with Ray Tune (ASHA stops weak trials early) and print a table of the trials.

    Example: `ddetr tune sweep.yaml --ray 10.0.0.1:6379`
    """
    from .tune import tune as tune_sweep

    tune_sweep(sweep, ray)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> None:
    """Write RUN_DIR/report.html: one self-contained page with curves, scores, events and settings of a run."""
    from .report import report as write_report

    say(str(write_report(run_directory)))


@app.command()
def doctor() -> None:
    """Check versions, the op's binary, the GPU and DeepSpeed's compiled ops, and say how to fix what is wrong.

    Exit status 1 when something essential is broken.
    """
    from .doctor import doctor as examine

    if not examine():
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script: a user's mistake becomes one message and exit status 2."""
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that its encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # prints the warnings of commands that keep no log
        logging.lastResort.setFormatter(LogFormatter())
    try:
        app(normalised_arguments(arguments))
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if isinstance(error, ImportError) and (error.name or "").startswith("ddetr"):
            raise  # not a missing requirement but a defect of ours
        if "--traceback" in arguments:
            traceback_module.print_exc()
        print(f"ddetr: {paragraph(_message(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; `ddetr doctor` lists what is missing and how to install it"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}" + "".join(
            f"; {name}={value} names this place: set it to a folder of yours"
            for name in FOLDERS
            if (value := os.environ.get(name)) and f"{value}/".startswith(f"{error.filename}/")
        )
    return str(error) or type(error).__name__


if __name__ == "__main__":  # torchrun --module ddetr.launch.cli
    main()
