"""`ddetr train`: checks everything, makes the run directory, serves metrics, trains."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..core.checkpoint import checkpoints, find_checkpoint, load_weights
from ..core.checkpoint.codec import Checkpoint
from ..core.checkpoint.labels import check_evaluable, check_same
from ..core.checkpoint.manifest import verify
from ..core.config import Config, dump, gives_classes, with_classes
from ..core.evaluation.evaluator import without_score_of
from ..core.evaluation.result import Measure, is_evaluated
from ..core.evaluation.scores import check_protocols, check_set, headline, meanings
from ..core.model import pretrained
from ..core.model.backbone import Backbone
from ..core.model.detector import Detector, build
from ..core.ownership import check_links, remember
from ..core.progress import Position
from ..core.training.beside import LOG, unevaluated
from ..core.training.changes import told_of_changes
from ..core.training.engine import deepspeed_config
from ..core.training.heartbeat import TRY_AGAIN
from ..core.training.optimizer import check_trained, freeze_without_rate, rate_advice
from ..core.training.reports import EndReport, Observer, StartReport
from ..core.training.schedule import End, Schedule, nothing_left, planned
from ..core.training.signals import ignored_stop_signals, stop_signals
from ..core.training.trainer import Trainer, training_stream
from ..core.training.trial import SIDE, Trial, try_step
from ..core.training.world import World, join
from ..data.cache import open_shards
from ..data.categories import Categories
from ..data.folders import obstacle
from ..data.index import ShardIndex
from ..data.stream import TrainStream
from ..monitoring.exporter import serve
from ..monitoring.metrics import RunMetrics
from . import lifeline
from .console import LogFormatter, say
from .environment import SharedMemory, check, check_compiler_cache, check_shared_memory
from .identity import Identity, identify
from .record import Record, announced

log = logging.getLogger("ddetr")


def run(
    config: Config,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
    observers: Sequence[Observer] = (),
) -> Path:
    """Train, as one process or as one rank of many; returns the run directory.

    `resume` is a run directory to continue. `observers` get every report of rank 0, as metrics and records do. With
    `dry_run` all checks are made, a step is taken on a small image, the plan is printed, and nothing is written. Raises
    ValueError, FileNotFoundError or OSError with one message for what the user can mend, before any work. Exits with
    status 75 when the run stopped because other ranks were asked to: a launcher should start this one again.
    """
    check_protocols()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_log_to_console())
        given = config
        config, train_index, validation_index = _open_data(given)
        told_of_classes = _told_of_classes(given, train_index)
        deepspeed_json = deepspeed_config(config)
        model = _without_weights(config)
        if config.train.compile:
            check_compiler_cache()
        world = join(config.train)
        stack.callback(_leave)
        stream = training_stream(config, train_index, world)
        check_shared_memory(world.gather([SharedMemory.of(stream, config, world.device)], SharedMemory))
        world.agree(lambda: _check_output(config, resume), None)
        indexes = [index for index in (train_index, validation_index) if index]
        machines = check(config, world, indexes, writes=not dry_run)
        began = world.agree(
            lambda: _beginning(config, model, resume, train_index, validation_index, stream), _Beginning
        )
        began.told.extend(_told_of_validation(config, train_index, validation_index))
        run_directory, resumes = began.run_directory, began.resumes
        if began.nothing_left is not None:
            if world.rank == 0:
                log.info(began.nothing_left)
            return run_directory
        if not resumes:
            world.agree(lambda: _fit_initial_weights(model, config, train_index.categories), None)
            if dry_run and _is_fetched(config):
                world.agree(lambda: pretrained.check(config.model.backbone), None)
            elif not dry_run:
                _fetch_backbone(config, world)
        if dry_run:
            trial = try_step(config, world)
            if world.rank == 0:
                _print_plan(config, stream, began, told_of_classes, trial, world, deepspeed_json)
            return run_directory
        identity = world.agree(lambda: identify(run_directory), Identity)
        metrics = RunMetrics(identity.label, world.rank)
        addresses: list[str] = []
        if config.monitor.enabled:
            port = config.monitor.port + world.local_rank if config.monitor.port else 0
            exporter = stack.enter_context(serve(metrics.registry, config.monitor.host, port))
            addresses = world.gather([exporter.address], str)
        observing: list[Observer] = [metrics.observe]
        if world.local_rank == 0:
            remember(config)
        if world.rank == 0:  # the first thing written: all that can be checked beforehand has been
            observing += [stack.enter_context(Record(run_directory, config)).observe, *observers]
            identity.write()
            stack.enter_context(announced(addresses, run_directory, identity.label))

        if world.rank == 0:
            for line in (*machines, *told_of_classes):
                log.info(line)
            for line in began.told:
                log.warning(line)
            if advice := rate_advice(config):
                log.warning(advice)
        for observer in observing:
            observer(StartReport(resumes, world.size, str(world.device), torch.__version__, tuple(machines)))
        trainer = Trainer(
            config,
            run_directory=run_directory,
            world=world,
            stream=stream,
            categories=train_index.categories,
            validation_index=validation_index,
            resume=resumes,
            observers=observing,
            evaluator=lifeline.command("beside", config.eval.ray) if config.eval.ray is not None else (),
        )
        if trainer.beside:
            stack.callback(trainer.beside.close)
        end = trainer.train()
        missing = _missing_beside(trainer) if end is End.FINISHED else []
        stack.enter_context(ignored_stop_signals())
        trainer.observe(EndReport(end.value))
    if missing:
        told = (
            f"{run_directory} is trained, but the evaluation of step {', '.join(map(str, missing))} is missing "
            f"(eval.required={config.eval.required}). `ddetr eval {run_directory} --follow` makes up for it"
        )
        if world.size == 1:
            raise OSError(f"{told}, and so does --resume {run_directory}")
        say(f"ddetr: {told}", file=sys.stderr)  # launchers would start all ranks again for another exit status
    if end is End.OTHERS:  # a launcher should not take this for the end, and leave this host out of the rest
        sys.exit(TRY_AGAIN)
    return run_directory


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _missing_beside(trainer: Trainer) -> list[int]:
    """Wait for the evaluations that a run needs, without the other ranks; the steps of those that did not come."""
    if trainer.beside is None:
        return []
    asked = [True] * trainer.watch.asked  # while the last checkpoint was saved
    with stop_signals(lambda: asked.append(True), "the run ends without what it waits for"):
        _leave()
        missing = trainer.beside.finish(lambda: bool(asked))
    return [] if asked else missing


def check_beforehand(config: Config, metric: str | None = None) -> None:
    """All that a `run` of one rank finds out about a configuration before it makes anything, and whether it will have
    the score `metric`, by which a search goes. Raises what it raises, and ValueError.
    """
    if config.eval.ray is not None:
        raise ValueError(
            f"eval.ray={config.eval.ray}: a sweep goes by each evaluation as it comes, on the resources of its trial; "
            "leave it out"
        )
    config, index, validation_index = _open_data(config)
    if validation_index and validation_index.lack:
        raise ValueError(without_score_of(validation_index))
    if validation_index and metric and metric not in (scores := meanings(validation_index.protocol)):
        raise ValueError(f"metric: {validation_index.location} has no {metric}; its scores are {', '.join(scores)}")
    training_stream(config, index, World(0, 1, 0, torch.device("cpu")))
    deepspeed_config(config)
    _fit_initial_weights(_without_weights(config), config, index.categories)


def _open_data(config: Config) -> tuple[Config, ShardIndex, ShardIndex | None]:
    """The sets of training and validation, and the configuration with the number of classes that the first one has."""
    if config.data.train is None:
        raise ValueError(
            "data.train is not set: give the folder of training shards that `ddetr data pack` wrote, data.train=FOLDER"
        )
    train_index = open_shards(config.data.train, config.data)
    validation_index = open_shards(config.data.validation, config.data) if config.data.validation else None
    if train_index.lack:
        raise ValueError(
            f"data.train={train_index.location}: {train_index.lack}, so there is nothing to train on; set data.train "
            "to shards with objects"
        )
    config = with_classes(config, count := len(train_index.categories))
    if count != config.model.num_classes:
        raise ValueError(
            f"model.num_classes={config.model.num_classes}, but {train_index.location} has {count} categories; "
            f"leave it out, or set model.num_classes={count}"
        )
    if config.eval.ray is not None:
        lacking = [] if validation_index else ["data.validation is not set"]
        lacking += [] if config.train.evaluate_every_epochs else ["train.evaluate_every_epochs is 0"]
        if lacking:
            raise ValueError(f"eval.ray={config.eval.ray}: there is nothing to evaluate: {' and '.join(lacking)}")
    if validation_index:
        check_set(validation_index, config.eval)
        known = dict(zip(train_index.categories.ids, train_index.categories.names, strict=True))
        remedy = "Pack validation shards from data with all or some of the categories of training"
        where, place = "the training shards", train_index.location
        check_evaluable(validation_index.categories, validation_index.location, known, where, place, remedy)
    return config, train_index, validation_index


def _told_of_classes(given: Config, train: ShardIndex) -> list[str]:
    if gives_classes(given):
        return []
    return [f"model.num_classes={len(train.categories)}: as many as {train.location} has categories"]


def _told_of_validation(config: Config, train: ShardIndex, validation: ShardIndex | None) -> list[str]:
    """What there is to know of the run's scores beforehand."""
    if validation is None or not config.train.evaluate_every_epochs:
        return []
    if validation.lack:
        return [without_score_of(validation)]
    listed, all_ = len(validation.categories), len(train.categories)
    score = headline(validation.protocol)
    few = f"{validation.location} lists {listed} of the {all_} categories of training: {score} is of these alone"
    return [few] if listed < all_ else []


def _check_output(config: Config, resume: Path | None) -> None:
    """Raises OSError unless the run directory can be made and written to."""
    if resume is not None:
        folder, remedy = resume, "resume a copy of it, or as an account that may write there"
    else:
        folder, remedy = _named(config), "set train.output to another folder"
    if reason := obstacle(folder):
        raise OSError(f"train.output={config.train.output}: the run cannot be kept there: {reason}; {remedy}")


def _without_weights(config: Config) -> Detector:
    """The model's shape alone, with what trains of it: says what backbone cannot be used before anything is written."""
    with torch.device("meta"):
        model = build(config.model.model_copy(update={"pretrained_backbone": False}))
    freeze_without_rate(model, config.optim)
    return model


def _fit_initial_weights(model: Detector, config: Config, categories: Categories) -> None:
    """Whether they fit the model, before anything is written. Raises what `load_weights` raises."""
    if config.train.initial_weights:
        new = config.train.new_class_head
        load_weights(model, config.train.initial_weights, new_class_head=new, categories=categories, tell=_unsaid)


def _unsaid(line: str) -> None:
    """The run says it, once."""


def _is_fetched(config: Config) -> bool:
    """Whether a run that begins takes its backbone's pretrained weights."""
    return config.model.pretrained_backbone and not config.train.initial_weights


def _named(config: Config) -> Path:
    """The run directory that the settings name; without a train.name the folder it will be in."""
    return Path(config.train.output) / (config.train.name or "")


def _fetch_backbone(config: Config, world: World) -> None:
    """Its weights into the cache of each host, before a run is written. Collective; raises OSError on all ranks."""
    mistakes: list[str] = []
    if _is_fetched(config) and world.local_rank == 0:
        found = pretrained.source(config.model.backbone)
        if found is not None and not found.is_cached:
            try:
                Backbone(config.model)
            except OSError as error:
                mistakes.append(str(error))
    if mistakes := world.gather(mistakes, str):
        raise OSError(mistakes[0])


def _print_plan(
    config: Config,
    stream: TrainStream,
    began: "_Beginning",
    told_of_classes: list[str],
    trial: Trial,
    world: World,
    deepspeed_json: dict[str, Any],
) -> None:
    schedule = Schedule.of(config.train, stream.steps_per_epoch, began.done)
    print(dump(config, for_others=True))
    print(f"# DeepSpeed: {json.dumps(deepspeed_json)}")
    ranks = f"{world.size} rank(s), device {world.device.type}"
    print(f"# {ranks}; {trial.trained / 1e6:.1f} M parameters trained, {trial.frozen / 1e6:.1f} M frozen")
    for line in filter(None, (*told_of_classes, rate_advice(config), *began.told)):
        print(f"# {line}")
    print(f"# {planned(schedule, stream.num_samples, config, began.done)}")
    print(
        f"# tried: shards, weights and checkpoint where there are any, one step on one image of {SIDE} x {SIDE} pixels "
        f"a rank: loss {trial.loss:.3g}, {trial.seconds:.1f} s"
    )
    fetched = "fetching the backbone's weights, " if config.model.pretrained_backbone and not began.resumes else ""
    common = "whether the hosts share train.output, " if world.size > 1 else ""
    cluster = "" if config.eval.ray is None else f", the Ray cluster at {config.eval.ray}"
    print(f"# not tried: {fetched}{common}batches of full size, saving{cluster}")


@dataclass(frozen=True)
class _Beginning:
    """Where the run is recorded, whether it resumes what is there, and what to say of that."""

    run_directory: Path
    resumes: bool
    told: list[str] = field(default_factory=list)
    done: Position | None = None
    nothing_left: str | None = None


def _beginning(
    config: Config,
    model: Detector,
    resume: Path | None,
    index: ShardIndex,
    validation_index: ShardIndex | None,
    stream: TrainStream,
) -> _Beginning:
    """Raises ValueError for a run that is there already, and for a checkpoint that is damaged or does not fit."""
    path = Path(config.train.output) / (config.train.name or time.strftime("%Y%m%d-%H%M%S"))
    if resume is None and path.exists() and not config.train.auto_resume:
        raise ValueError(f"{path} exists already; continue it with --resume {path}, or choose another train.name")
    path = resume.resolve() if resume is not None else path
    if path.exists():
        own = ("checkpoints", *Record.FILES, *(("eval", LOG) if config.eval.ray is not None else ()))
        check_links(path, *(path / name for name in own), *path.glob("checkpoints/*"))
    if resume is None and not checkpoints(path):
        return _Beginning(path, resumes=False)
    checkpoint = find_checkpoint(path)
    verify(checkpoint)
    stored = Checkpoint.read(checkpoint)
    stored.check_fit(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_trained(trained, stored.trained, checkpoint)
    if config.train.ema_decay is not None and not stored.averaged:
        raise ValueError(f"{checkpoint} has no EMA: the run was trained without train.ema_decay")
    check_same(stored.categories, index.categories, checkpoint, index.location)
    schedule = Schedule.of(config.train, stream.steps_per_epoch, stored.position)
    over = None if _lacks_results(path, config, validation_index) else nothing_left(stored.position, schedule)
    told = told_of_changes(stored.config, config, path, stored.position, stream.steps_per_epoch)
    return _Beginning(path, True, told, stored.position, over)


def _lacks_results(run_directory: Path, config: Config, index: ShardIndex | None) -> bool:
    """Whether the end of the run is to evaluate, or to wait for, what it has not evaluated yet."""
    if index is None or not config.train.evaluate_every_epochs:
        return False
    measure = Measure.of(config, index)
    required = "last" if config.eval.ray is None else config.eval.required
    if required == "all":
        return bool(unevaluated(run_directory, config, measure))
    return required == "last" and not is_evaluated(find_checkpoint(run_directory), measure)


@contextlib.contextmanager
def _log_to_console() -> Iterator[None]:
    """A context in which the log goes to standard output, unless the program has handlers of its own."""
    if log.handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogFormatter("%(message)s"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
