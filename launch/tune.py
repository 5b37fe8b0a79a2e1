"""`ddetr tune`: hyperparameter search on Ray Tune. Every trial is an ordinary training run with its own directory."""

import csv
import io
import logging
import os
import time
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..core.config import Config, changed, without_logins
from ..core.overrides import read, written
from ..core.reports import EvaluationReport, without_score
from ..data.documents import as_json
from ..data.index import write_whole
from .cluster import cluster
from .console import Terminal, brief, paragraph, say
from .placement import anywhere
from .sweep import Sweep, read_sweep


def tune(sweep_file: Path, ray_address: str | None = None) -> Path:
    """Run the sweep, print a table of its trials, write results.json and results.csv; returns the path of the former.

    ray_address: an address as `cluster` takes it, by default `local`. On a cluster of several nodes the shards and
    the output folder must be visible to all of them under the same path.
    Raises ConfigError that lists every mistake of the file before anything starts, and ValueError with the first
    trial's error when none succeeds.
    """
    sweep, base = read_sweep(sweep_file)
    folder = Path(sweep.output or f"runs/{sweep_file.stem}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another output in {sweep_file}")
    with cluster(ray_address or "local"):
        _check_resources(sweep)
        rows = _run_trials(sweep, base, folder)
    rows.sort(key=lambda row: _rank(row, sweep.mode))
    _write(folder, rows, sweep)
    _print(rows, sweep, folder)
    if rows[0]["best"] is None:
        raise ValueError(f"no trial succeeded; the first error: {rows[0]['error']}")
    return folder / "results.json"


def _check_resources(sweep: Sweep) -> None:
    """Tune would wait without end for a node that does not exist."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial}
    if not any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in nodes):
        offered = "; ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ValueError(
            f"cpus_per_trial={sweep.cpus_per_trial} and gpus_per_trial={sweep.gpus_per_trial:g}: no node of the Ray "
            f"cluster has that much ({offered})"
        )


def _run_trials(sweep: Sweep, base: Config, folder: Path) -> list[dict[str, Any]]:
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    class Progress(ray_tune.Callback):
        """One line for each evaluation and for each trial that ends. Tune pickles it, so it holds no console."""

        ended = 0

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            say(f"{trial} epoch {result['epoch']}: {sweep.metric} {result[sweep.metric]:.4f}")

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self.ended += 1
            say(f"{trial} ended ({self.ended} of {sweep.samples})")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self.ended += 1
            say(f"{trial} failed ({self.ended} of {sweep.samples}); the others go on")

    scheduler = FIFOScheduler()
    if asha := sweep.scheduler.asha:
        longest = max(base.train.epochs, asha.grace_epochs)
        scheduler = ASHAScheduler(
            time_attr="epoch", max_t=longest, grace_period=asha.grace_epochs, reduction_factor=asha.reduction_factor
        )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its error.txt
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with it verbose=0 is silent
    trial = ray_tune.with_parameters(_trial, base=_placed(base, sweep), folder=str(folder))
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, {"cpu": sweep.cpus_per_trial, "gpu": sweep.gpus_per_trial}),
        param_space={key: distribution.domain() for key, distribution in sweep.search.items()},
        tune_config=ray_tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            num_samples=sweep.samples,
            max_concurrent_trials=sweep.concurrent,
            search_alg=BasicVariantGenerator(random_state=sweep.seed),
            scheduler=scheduler,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name="ray", storage_path=str(folder), verbose=0, callbacks=[Progress()], log_to_file=True
        ),
    )
    return [_row(result, sweep, base, folder) for result in tuner.fit()]


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.trial_id.rsplit('_', 1)[-1]}"


def _placed(base: Config, sweep: Sweep) -> dict[str, Any]:
    """The base as a trial on any node needs it: absolute paths, its share of the CPUs, a free port."""
    values = anywhere(base)
    values["train"]["threads"] = base.train.threads or sweep.cpus_per_trial
    values["monitor"]["port"] = 0
    return values


def _trial(parameters: dict[str, Any], *, base: dict[str, Any], folder: str) -> None:
    """Runs in a Ray worker: the same training as `ddetr train`, reporting each evaluation to Tune."""
    from ray import tune as ray_tune

    from .train import run

    name = ray_tune.get_context().get_trial_name()
    assert name is not None, "inside a trial"
    overrides = [written(key, value) for key, value in parameters.items()]
    overrides += [written("train.output", str(Path(folder) / "trials")), written("train.name", name)]
    config = changed(Config.model_validate(base), overrides, name)

    def told(report: EvaluationReport) -> None:
        if report.num_not_finite:  # no scheduler may compare it
            raise FloatingPointError(f"step {report.step}: {without_score(report.num_not_finite)}")
        ray_tune.report({"epoch": report.epoch + 1, "step": report.step, **report.metrics})

    run(config, report=told)


def _row(result: Any, sweep: Sweep, base: Config, folder: Path) -> dict[str, Any]:
    """What became of one trial."""
    name = Path(result.path).name
    run_directory = folder / "trials" / name
    history = result.metrics_dataframe
    if history is None or sweep.metric not in history:
        best = best_epoch = epochs = None
    else:
        position = history[sweep.metric].idxmax() if sweep.mode == "max" else history[sweep.metric].idxmin()
        best, best_epoch = float(history[sweep.metric][position]), int(history["epoch"][position])
        epochs = int(history["epoch"].max())
    error = None
    if result.error is not None:
        cause = getattr(result.error, "cause", None) or result.error
        error = f"{type(cause).__name__}: {cause}".strip()
    return {
        "trial": name,
        "parameters": {key: result.config.get(key) for key in sweep.search} if result.config else {},
        "best": best,
        "best_epoch": best_epoch,
        "epochs": epochs,
        "stopped_early": error is None and epochs is not None and epochs < base.train.epochs,
        "error": error,
        "run_directory": str(run_directory) if run_directory.is_dir() else None,
    }


def _rank(row: dict[str, Any], mode: str) -> tuple[bool, float, str]:
    """Best first, failed trials last."""
    best = row["best"]
    return best is None, 0.0 if best is None else (-best if mode == "max" else best), row["trial"]


def _shown(sweep: Sweep) -> dict[str, Any]:
    """The sweep as results.json, which is handed on, has it: without logins of addresses."""
    values = sweep.model_dump(mode="json")
    split = [read(override, Config) for override in sweep.overrides]
    return {**values, "overrides": [written(".".join(path), without_logins(value)) for path, value in split]}


def _write(folder: Path, rows: list[dict[str, Any]], sweep: Sweep) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"metric": sweep.metric, "mode": sweep.mode, "sweep": _shown(sweep), "trials": rows}
    write_whole(folder / "results.json", as_json(content, indent=1).encode())
    text = io.StringIO()
    fields = ["trial", *sweep.search, "best", "best_epoch", "epochs", "stopped_early", "error", "run_directory"]
    writer = csv.DictWriter(text, fields, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, **row["parameters"]} for row in rows)
    write_whole(folder / "results.csv", text.getvalue().encode(errors="backslashreplace"))


def _print(rows: list[dict[str, Any]], sweep: Sweep, folder: Path) -> None:
    names = [key.rpartition(".")[2] for key in sweep.search]
    titles = [name if names.count(name) == 1 else key for name, key in zip(names, sweep.search, strict=True)]
    table = Table("trial", *titles, sweep.metric, "at epoch", "ended", title=f"{len(rows)} trials, the best first")
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        values = [_short(row["parameters"].get(key)) for key in sweep.search]
        best = ["-", "-"] if row["best"] is None else [f"{row['best']:.4f}", str(row["best_epoch"])]
        ended = f"{'stopped at' if row['stopped_early'] else 'epoch'} {row['epochs']}"
        table.add_row(row["trial"].removeprefix("trial_"), *values, *best, "failed" if row["error"] else ended)
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=160)
    console.print(table)
    for row in rows:
        if row["error"]:
            console.print(Text(paragraph(f"{row['trial']} failed: {row['error']}")), soft_wrap=True)
            console.print(f"  traceback: {folder}/ray/{row['trial']}/error.txt", soft_wrap=True)
    console.print(
        f"The trials' runs are in {folder}/trials, the table in {folder}/results.json and .csv", soft_wrap=True
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else brief(str(value))
