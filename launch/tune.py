"""`ddetr tune`: hyperparameter search on Ray Tune. Every trial is an ordinary training run with its own directory."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from ..core.config import Config, changed
from ..core.evaluation.result import without_score
from ..core.overrides import written
from ..core.training.reports import EvaluationReport, Report
from .cluster import cluster
from .console import say
from .placement import from_anywhere
from .sweep import Sweep, read_sweep
from .trials import Trials


def tune(sweep_file: Path, ray_address: str | None = None) -> Path:
    """Run the sweep, print a table of its trials; returns the path of results.json, which has it from the start.

    ray_address: an address as `cluster` takes it, by default `local`. On a cluster of several nodes the shards and
    the output folder must be visible to all of them under the same path.
    Raises ConfigError that lists every mistake of the file before anything starts, and ValueError with the first
    trial's error when none succeeds.
    """
    sweep, base = read_sweep(sweep_file)
    folder = Path(sweep.output or f"runs/{sweep_file.stem}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another output in {sweep_file}")
    trials = Trials(sweep, folder, base.train.epochs)
    with cluster(ray_address or "local"):
        at_once = _room(sweep)
        trials.create()
        say(f"{sweep.samples} trial(s), {at_once} at once, in {folder}/trials")
        say(f"The table so far is in {folder}/results.json and .csv, written anew after each result")
        _run_trials(sweep, base, folder, trials)
    trials.interrupt()
    trials.print()
    if not any(row["best"] is not None for row in trials.rows):
        errors = [row["error"] for row in trials.rows if row["error"]]
        raise ValueError(
            f"no trial succeeded; the first error: {errors[0]}" if errors else f"no trial has a {sweep.metric}"
        )
    return folder / "results.json"


def _room(sweep: Sweep) -> int:
    """How many trials the cluster runs at once: `concurrent`, or what it has room for, which is said then.

    Raises ValueError when it has room for none: Tune would wait without end for a node that does not exist.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial}
    wanted = {name: count for name, count in wanted.items() if count}
    room = sum(min(int(node.get(name, 0) / count) for name, count in wanted.items()) for node in nodes)
    offered = "; ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
    asked = f"cpus_per_trial={sweep.cpus_per_trial} and gpus_per_trial={sweep.gpus_per_trial:g}"
    if not room:
        raise ValueError(f"{asked}: no node of the Ray cluster has that much ({offered})")
    if room < sweep.concurrent:
        say(f"concurrent={sweep.concurrent}, but with {asked} the Ray cluster has room for {room} ({offered})")
    return min(room, sweep.concurrent)


def _run_trials(sweep: Sweep, base: Config, folder: Path, table: Trials) -> None:
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    class Progress(ray_tune.Callback):
        """The table, and one line for each evaluation and for each trial that ends. Tune pickles it."""

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            table.begin(str(trial), trial.config)

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            table.add(str(trial), result["epochs"], result[sweep.metric])
            say(f"{trial} after {result['epochs']} epoch(s): {sweep.metric} {result[sweep.metric]:.4f}")

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            table.end(str(trial))
            say(f"{trial} ended ({table.ended} of {sweep.samples})")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            table.begin(str(trial), trial.config)  # where it did not even start
            table.end(str(trial), _error(_raised(trial)))
            say(f"{trial} failed ({table.ended} of {sweep.samples}); the others go on")

    scheduler = FIFOScheduler()
    if asha := sweep.scheduler.asha:
        longest = max(base.train.epochs, asha.grace_epochs)
        scheduler = ASHAScheduler(
            time_attr="epochs", max_t=longest, grace_period=asha.grace_epochs, reduction_factor=asha.reduction_factor
        )
    logging.getLogger("ray.tune").setLevel(logging.WARNING)  # ray.init has set it to errors alone
    # With the first verbose=0 is silent; the second: a failed trial's traceback is in its error.txt.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    # Its share of the CPUs, a free port.
    settings = [f"train.threads={base.train.threads or sweep.cpus_per_trial}", "monitor.port=0"]
    base = changed(base, settings, "the sweep")
    trial = ray_tune.with_parameters(_trial, base=base, folder=folder, here=Path.cwd())
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, {"cpu": sweep.cpus_per_trial, "gpu": sweep.gpus_per_trial}),
        param_space={key: distribution.domain() for key, distribution in sweep.search.items()},
        tune_config=ray_tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            num_samples=sweep.samples,
            # Tune's own max_concurrent_trials is for searchers, and dropped beside this generator.
            search_alg=BasicVariantGenerator(random_state=sweep.seed, max_concurrent=sweep.concurrent),
            scheduler=scheduler,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name="ray", storage_path=str(folder), verbose=0, callbacks=[Progress()], log_to_file=True
        ),
    )
    found = tuner.fit()
    if not table.rows:  # behind a ray:// address the callback is in a process of the cluster
        for result in found:
            _take(table, result, sweep.metric)


def _take(table: Trials, result: Any, metric: str) -> None:
    name, history = Path(result.path).name, result.metrics_dataframe
    table.begin(name, result.config or {})
    if history is not None and metric in history:
        for epochs, score in zip(history["epochs"], history[metric], strict=True):
            table.add(name, int(epochs), float(score))
    table.end(name, _error(result.error) if result.error else None)


def _raised(trial: Any) -> Exception:
    """What ended a trial, from Ray's files on this machine: where Tune looks itself, they appear later."""
    from ray import cloudpickle

    if file := trial.pickled_error_file:
        return cloudpickle.loads(Path(file).read_bytes())
    return RuntimeError(Path(trial.error_file).read_text(errors="replace"))


def _error(error: Exception) -> str:
    """What a trial raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".strip()


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.trial_id.rsplit('_', 1)[-1]}"


def _trial(parameters: dict[str, Any], *, base: Config, folder: Path, here: Path) -> None:
    """Runs in a Ray worker, in a folder of its own: the same training as `ddetr train`, reporting each evaluation.

    here: where the search was started, which relative paths mean.
    """
    from ray import tune as ray_tune

    from .train import run

    name = ray_tune.get_context().get_trial_name()
    assert name is not None, "inside a trial"
    overrides = [written(key, value) for key, value in parameters.items()]
    overrides += [written("train.output", str(folder / "trials")), written("train.name", name)]
    config = from_anywhere(changed(base, overrides, name), here)

    def tell(report: Report) -> None:
        if not isinstance(report, EvaluationReport):
            return
        if report.result.num_not_finite:  # no scheduler may compare it
            raise FloatingPointError(f"step {report.step}: {without_score(report.result.num_not_finite)}")
        ray_tune.report({"epochs": report.epoch + 1, "step": report.step, **report.result.metrics})

    run(config, observers=[tell])
