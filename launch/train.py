"""`ddetr train`: checks everything, makes the run directory, serves metrics, trains."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from ..core.changes import told_of_changes
from ..core.checkpoint import checkpoints, contents, find_checkpoint, load_weights
from ..core.config import Config, dump
from ..core.detector import Detector, build
from ..core.engine import deepspeed_config
from ..core.heartbeat import TRY_AGAIN
from ..core.labels import check_same
from ..core.manifest import is_evaluated, resumable, verify
from ..core.optimizer import rate_advice
from ..core.ownership import check_links, remember
from ..core.reports import CheckpointReport, EvaluationReport, FaultReport, Report, SavingReport, StepReport, as_json
from ..core.timetable import Position, Timetable, nothing_left, planned
from ..core.trainer import train, training_stream
from ..core.trial import SIDE, Trial, try_step
from ..core.world import World, join
from ..data import documents
from ..data.cache import open_shards
from ..data.categories import Categories
from ..data.index import ShardIndex, write_whole
from ..data.stream import TrainStream
from ..monitoring.exporter import serve, write_targets
from ..monitoring.metrics import RunMetrics
from .console import LogFormatter, say
from .environment import check
from .identity import Identity, identify

log = logging.getLogger("ddetr")


def run(
    config: Config,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
    report: Callable[[EvaluationReport], None] | None = None,
) -> Path:
    """Train, as one process or as one rank of many; returns the run directory.

    `resume` is a run directory to continue. `report` is called on rank 0 after each evaluation. With `dry_run` all
    checks are made, a step is taken on a small image, the plan is printed, and nothing is written. Raises ValueError,
    FileNotFoundError or OSError with one message for what the user can mend, before any work. Exits with status 75 when
    the run stopped because other ranks were asked to: a launcher should start this one again.
    """
    _log_to_console()
    train_index, validation_index = _open_data(config)
    deepspeed_json = deepspeed_config(config)
    model = _without_weights(config)
    with contextlib.ExitStack() as stack:
        world = join(config.train)
        stack.callback(dist.destroy_process_group)
        stream = training_stream(config, train_index, world)
        machines = check(config, world, [index for index in (train_index, validation_index) if index])
        began = world.agree(lambda: _beginning(config, model, resume, train_index, stream), _Beginning)
        run_directory, resumes = began.run_directory, began.resumes
        if began.nothing_left is not None:
            if world.rank == 0:
                log.info(began.nothing_left)
            return run_directory
        if not resumes:
            world.agree(lambda: _fit_initial_weights(model, config, train_index.categories), None)
        if dry_run:
            trial = try_step(config, world)
            if world.rank == 0:
                _print_plan(config, stream, began, trial, world, deepspeed_json)
            return run_directory
        identity = world.agree(lambda: identify(run_directory), Identity)
        metrics = RunMetrics(identity.label, world.rank)
        addresses: list[str] = []
        if config.monitor.enabled:
            port = config.monitor.port + world.local_rank if config.monitor.port else 0
            exporter = stack.enter_context(serve(metrics.registry, config.monitor.host, port))
            addresses = world.gather([exporter.address], str)
        record: _Record | _Quiet = _Quiet()
        if world.local_rank == 0:
            remember(config)
        if world.rank == 0:  # the first thing written: all that can be checked beforehand has been
            record = stack.enter_context(_Record(run_directory, config))
            identity.write()
            stack.enter_context(_announced(addresses, run_directory, identity.label))

        def observe(item: Report) -> None:
            if isinstance(item, CheckpointReport):
                if item.error is None:
                    metrics.checkpoint_saved()
            elif isinstance(item, StepReport | EvaluationReport):
                metrics.observe(item)
            record.observe(item)
            if report is not None and world.rank == 0 and isinstance(item, EvaluationReport):
                report(item)

        if world.rank == 0:
            for line in machines:
                log.info(line)
            for line in began.told:
                log.warning(line)
            if advice := rate_advice(config):
                log.warning(advice)
        record.event(
            "resume" if resumes else "start",
            ranks=world.size,
            device=str(world.device),
            torch=torch.__version__,
            machines=machines,
        )
        others_stopped = train(
            config,
            run_directory=run_directory,
            world=world,
            stream=stream,
            categories=train_index.categories,
            validation_index=validation_index,
            resume=resumes,
            observe=observe,
        )
        record.event("stop")
    if others_stopped:  # a launcher should not take this for the end of training, and leave this host out of the rest
        sys.exit(TRY_AGAIN)
    return run_directory


def check_beforehand(config: Config) -> None:
    """All that a `run` of one rank finds out about a configuration before it makes anything. Raises what it raises."""
    index, _ = _open_data(config)
    training_stream(config, index, World(0, 1, 0, torch.device("cpu")))
    deepspeed_config(config)
    _fit_initial_weights(_without_weights(config), config, index.categories)


def _open_data(config: Config) -> tuple[ShardIndex, ShardIndex | None]:
    if config.data.train is None:
        raise ValueError(
            "data.train is not set: give the folder of training shards that `ddetr data pack` wrote, data.train=FOLDER"
        )
    train_index = open_shards(config.data.train, config.data)
    validation_index = open_shards(config.data.validation, config.data) if config.data.validation else None
    if (count := len(train_index.categories)) != config.model.num_classes:
        raise ValueError(
            f"model.num_classes={config.model.num_classes}, but {train_index.location} has {count} categories; "
            f"set model.num_classes={count}"
        )
    if validation_index and validation_index.categories != train_index.categories:
        places = f"{train_index.location} and {validation_index.location}"
        raise ValueError(f"{places} differ in their categories; pack both anew")
    return train_index, validation_index


def _without_weights(config: Config) -> Detector:
    """The model's shape alone: names a backbone that timm does not have before anything is written."""
    with torch.device("meta"):
        return build(config.model.model_copy(update={"pretrained_backbone": False}))


def _fit_initial_weights(model: Detector, config: Config, categories: Categories) -> None:
    """Whether they fit the model, before anything is written. Raises what `load_weights` raises."""
    if config.train.initial_weights:
        new = config.train.new_class_head
        load_weights(model, config.train.initial_weights, new_class_head=new, categories=categories, tell=_unsaid)


def _unsaid(line: str) -> None:
    """The run says it, once."""


def _print_plan(
    config: Config, stream: TrainStream, began: "_Beginning", trial: Trial, world: World, deepspeed_json: dict[str, Any]
) -> None:
    timetable = Timetable.of(config.train, stream.steps_per_epoch, began.done)
    print(dump(config, for_others=True))
    print(f"# DeepSpeed: {json.dumps(deepspeed_json)}")
    ranks = f"{world.size} rank(s), device {world.device.type}"
    print(f"# {ranks}; {trial.trained / 1e6:.1f} M parameters trained, {trial.frozen / 1e6:.1f} M frozen")
    for line in filter(None, (rate_advice(config), *began.told)):
        print(f"# {line}")
    print(f"# {planned(timetable, stream.num_samples, config, began.done)}")
    print(
        f"# tried: shards, weights and checkpoint where there are any, one step on one image of {SIDE} x {SIDE} pixels "
        f"a rank: loss {trial.loss:.3g}, {trial.seconds:.1f} s"
    )
    fetched = "fetching the backbone's weights, " if config.model.pretrained_backbone and not began.resumes else ""
    print(f"# not tried: {fetched}batches of full size, saving")


@dataclass(frozen=True)
class _Beginning:
    """Where the run is recorded, whether it resumes what is there, and what to say of that."""

    run_directory: Path
    resumes: bool
    told: list[str] = field(default_factory=list)
    done: Position | None = None
    nothing_left: str | None = None


def _beginning(
    config: Config, model: Detector, resume: Path | None, index: ShardIndex, stream: TrainStream
) -> _Beginning:
    """Raises ValueError for a run that is there already, and for a checkpoint that is damaged or does not fit."""
    path = Path(config.train.output) / (config.train.name or time.strftime("%Y%m%d-%H%M%S"))
    if resume is None and path.exists() and not config.train.auto_resume:
        raise ValueError(f"{path} exists already; continue it with --resume {path}, or choose another train.name")
    path = resume.resolve() if resume is not None else path
    if path.exists():
        check_links(path, *(path / name for name in ("checkpoints", *_Record.FILES)), *path.glob("checkpoints/*"))
    if resume is None and not checkpoints(path):
        return _Beginning(path, resumes=False)
    checkpoint = find_checkpoint(path)
    verify(checkpoint)
    stored = resumable(checkpoint)
    load_weights(model, checkpoint)
    if config.train.ema_decay is not None and not stored.moving_average:
        raise ValueError(f"{checkpoint} has no moving average: the run was trained without train.ema_decay")
    found = contents(checkpoint)
    check_same(found.categories, index.categories, checkpoint, index.location)
    timetable = Timetable.of(config.train, stream.steps_per_epoch, stored.position)
    unevaluated = bool(config.data.validation and config.train.evaluate_every_epochs) and not is_evaluated(checkpoint)
    over = None if unevaluated else nothing_left(stored.position, timetable)
    told = told_of_changes(found.config, config, path, stored.position, stream.steps_per_epoch)
    return _Beginning(path, True, told, stored.position, over)


@contextlib.contextmanager
def _announced(addresses: list[str], run_directory: Path, run_label: str) -> Iterator[None]:
    """Write every rank's address into targets.json for Prometheus, and empty it when the run ends as it should."""
    targets = run_directory / "targets.json"
    labels = [{"run": run_label, "rank": str(rank)} for rank in range(len(addresses))]
    write_targets(targets, zip(addresses, labels, strict=True))
    log.info("run directory %s", run_directory)
    if addresses:
        log.info("metrics of run %s at %s", run_label, ", ".join(f"http://{address}/metrics" for address in addresses))
    yield
    write_targets(targets, [])  # not after an error: Prometheus should report the ranks of a broken run as missing


class _Record:
    """config.yaml, metrics.jsonl, events.jsonl and log.txt of a run; only rank 0 writes them."""

    FILES = ("metrics.jsonl", "events.jsonl", "log.txt")  # that are written to where they are

    def __init__(self, run_directory: Path, config: Config) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(run_directory / "config.yaml", dump(config).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(run_directory / "config.yaml")) from error
        self._every = config.train.log_every_steps
        self._steps: list[StepReport] = []  # since the last line of metrics.jsonl
        self._metrics = self._open(run_directory / "metrics.jsonl")
        self._events = self._open(run_directory / "events.jsonl")
        self._log = logging.FileHandler(run_directory / "log.txt", encoding="utf-8")
        self._log.setFormatter(LogFormatter("%(asctime)s %(message)s"))
        log.addHandler(self._log)

    @staticmethod
    def _open(path: Path) -> TextIO:
        if path.is_file():  # half a line is left where the process was killed or the disk full
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        return path.open("a", buffering=1)

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._write_steps()
        if error is not None:
            self.event("error", message=f"{type(error).__name__}: {error}")
        log.removeHandler(self._log)
        for file in (self._metrics, self._events, self._log):
            try:
                file.close()
            except OSError as error:  # lines for which there was no room: not what the run should end with
                say(f"{file.name}: its last lines are lost: {error.strerror}", file=sys.stderr)

    def event(self, name: str, **details: Any) -> None:
        self._append(self._events, documents.as_json({"time": time.time(), "event": name, **details}))

    def _append(self, file: TextIO, line: str) -> None:
        """A disk that is full costs lines, not the run."""
        try:
            file.write(line + "\n")
        except OSError as error:
            say(f"{file.name}: not written: {error.strerror}: {line}", file=sys.stderr)

    def observe(self, item: Report) -> None:
        if isinstance(item, CheckpointReport):
            if item.error is None:
                self.event(
                    "checkpoint",
                    step=item.step,
                    path=item.path,
                    seconds=item.seconds,
                    waited_seconds=item.waited_seconds,
                )
            else:
                self.event("checkpoint_failed", step=item.step, reason=item.error)
            return
        if isinstance(item, SavingReport):
            self._write_steps()
            return
        if isinstance(item, FaultReport):
            self._write_steps()
            self.event("ranks_lost", step=item.step, reason=item.message)
            return
        if isinstance(item, EvaluationReport):
            self.event("evaluation", step=item.step, AP=item.metrics["AP"], seconds=item.seconds)
            if item.num_not_finite:
                self.event("evaluation_not_finite", step=item.step, queries=item.num_not_finite)
            self._append(self._metrics, as_json(item))
            return
        for message in item.slow_ranks:
            self.event("slow_rank", step=item.step, reason=message)
        for message in item.bad_samples:
            self.event("bad_sample", step=item.step, reason=message)
        if item.skipped:
            self.event("skipped", step=item.step, reason=item.not_finite)
        if self._steps and self._steps[-1].epoch != item.epoch:
            self._write_steps()
        self._steps.append(item)
        if item.skipped or item.step % self._every == 0:
            self._write_steps()

    def _write_steps(self) -> None:
        """A line for the steps since the last one: every few steps, and wherever a run or an epoch may end."""
        steps, self._steps = self._steps, []
        if steps:
            self._append(self._metrics, as_json(steps))


class _Quiet:
    """The record of the ranks that keep none."""

    def event(self, name: str, **details: Any) -> None:
        pass

    def observe(self, item: Report) -> None:
        pass


def _log_to_console() -> None:
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(LogFormatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
