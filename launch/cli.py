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

from . import config_commands, detector_commands
from .arguments import (
    CONFIGURATION,
    ON_RAY,
    RayAddress,
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

# Variables that name folders in which torch and others make theirs, some as soon as they are imported.
FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCH_HOME", "HF_HOME", "TMPDIR")


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

    from ..core.training.signals import ignore_stop_signals
    from .train import run  # only now: a misspelt key need not wait for torch

    try:
        run(config, resume=resume, dry_run=dry_run)
    finally:
        ignore_stop_signals()  # until the process has ended, which takes torch a while


app.command()(config_commands.config)
app.command()(config_commands.model)


app.command("eval")(detector_commands.evaluate)
app.command()(detector_commands.predict)
app.command()(detector_commands.explain)


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
