"""`ddetr eval`: the scores of a checkpoint, or of every checkpoint of a run, here or on a Ray cluster."""

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from ..core.checkpoint import TrainedDetector, checkpoints, contents, load_detector, read_newest
from ..core.checkpoint.manifest import MANIFEST
from ..core.config import Config, ConfigError
from ..core.evaluation import result
from ..core.evaluation.columns import as_text, counted
from ..core.evaluation.evaluator import Count, ShardResult, check_categories, without_score_of
from ..core.evaluation.failures import failures
from ..core.evaluation.result import Result, weights_digest, without_score
from ..core.evaluation.scores import check_protocols
from ..core.ownership import ForeignSettingError, check_links, check_own
from ..data.cache import open_shards
from ..data.documents import as_json
from ..data.files import write_whole
from ..data.folders import obstacle
from ..data.index import ShardIndex
from ..data.location import Location
from ..data.truth import GroundTruth
from . import failures as failure_files
from .console import Terminal, progress_bar
from .evaluators import EvaluateShards, Evaluators

SHOWN = 10  # damaged images, of those that were left out


@dataclass(frozen=True)
class Found:
    """What an evaluation found: its result, the shards' results in their order, and the images that were left out."""

    result: Result
    shards: list[ShardResult]
    bad_samples: list[str]

    @property
    def detections(self) -> np.ndarray:
        """Rows of DETECTION_DTYPE."""
        return np.concatenate([shard.detections for shard in self.shards])

    @property
    def truth(self) -> GroundTruth:
        return GroundTruth.joined([shard.truth for shard in self.shards])


def evaluate(
    path: Path,
    overrides: list[str],
    data: Sequence[str | Path] = (),
    ray_address: str | None = None,
    output: Path | None = None,
    all_checkpoints: bool = False,
    use: Callable[[ShardIndex, GroundTruth, np.ndarray], None] = lambda index, truth, detections: None,
) -> dict[str, float]:
    """Evaluate the checkpoint at `path`; with `all_checkpoints` every one of the run directory `path`, oldest first.

    The run may train in that time: checkpoints that it deletes are left out with a line, those that it saves are
    evaluated, too. Of all checkpoints, a damaged one does not keep the others from being evaluated.

    data: the sets of shards to evaluate on, in place of the configuration's data.validation.
    ray_address: an address as `cluster` takes it; None evaluates in this process.
    output: folder for detections.json, ground_truth.json and the result, evaluation.json; with `all_checkpoints` for
    one folder a step. Without it they go into the run's `eval/step_XXXXXXXX`, and the result also in the checkpoint's
    folder, where its run finds it. Of several sets each has a folder of its name therein.
    use: gets the shards, their objects and the detections of each checkpoint.
    Returns the numbers of the last checkpoint, on the last set. Raises ValueError in the end that names the damaged
    ones, and FloatingPointError that names those which gave numbers that are not finite and so have no score.
    """
    check_protocols()
    console, sets = Terminal(), named_sets(data)
    damaged: dict[Path, str] = {}
    one = [] if all_checkpoints else [read_newest(path, lambda file: loaded(file, overrides))]
    metrics: dict[str, float] = {}
    without: list[str] = []
    with Evaluators(ray_address, console) as evaluators:
        every = one or _every_detector(path, overrides, console, damaged)
        for detector, weights, name, place in ((*pair, *one) for pair in every for one in sets.items()):
            index = shards(place, detector.config, detector.path, overrides)
            places = places_of(detector.path, output, each=all_checkpoints, inside=name)
            try:
                found = evaluate_detector(detector, weights, index, places, evaluators, console, use)
            except UnreadableResultError as error:
                if not all_checkpoints:
                    raise
                damaged[detector.path.parent] = str(error)
                console.print(str(error), soft_wrap=True)
                continue
            metrics = found.result.metrics
            if num_not_finite := found.result.num_not_finite:
                without.append(f"{detector.path}: {without_score(num_not_finite)}")
    if damaged := {checkpoint: why for checkpoint, why in damaged.items() if checkpoint.exists()}:
        listed = [*damaged.values(), *without]
        raise ValueError(f"{len(damaged)} checkpoint(s) could not be evaluated:\n" + "\n".join(listed))
    if without:
        raise FloatingPointError("\n".join(without))
    if not metrics:
        raise FileNotFoundError(f"{path}: all checkpoints were deleted meanwhile")
    return metrics


def named_sets(data: Sequence[str | Path]) -> dict[str, str | Path | None]:
    """Sets by the name of the folder that each of several has for its results; "" for one, or for the run's own.

    Raises ValueError for two of the same name.
    """
    if len(data) < 2:
        return {"": data[0] if data else None}
    sets: dict[str, str | Path | None] = {}
    for one in data:
        last = re.split(r"[/\\]", Location(one).shown.rstrip("/\\"))[-1]
        is_plain = re.fullmatch(r"\w[\w.-]{0,99}", last) and last != failure_files.WORST
        name = last if is_plain else f"set{len(sets) + 1}"
        if name in sets:
            raise ValueError(f"--data {sets[name]} and {one}: both would be called {name}; evaluate them one by one")
        sets[name] = one
    return sets


class UnreadableResultError(ValueError):
    """What lies where a result would be written is no result."""


def evaluate_detector(
    detector: TrainedDetector,
    weights: str,
    index: ShardIndex,
    places: list[Path],
    evaluators: Evaluators,
    console: Console,
    use: Callable[[ShardIndex, GroundTruth, np.ndarray], None] = lambda index, truth, detections: None,
) -> Found:
    """Evaluate one detector, and say and write what is found.

    weights: their digest. places: folders, the first one for all that is found, the others for the result alone.
    Raises UnreadableResultError, and OSError and ValueError as `evaluate`.
    """
    check_categories(detector, index)
    if index.lack and evaluators.is_new(index):
        console.print(without_score_of(index), soft_wrap=True)
    if reason := obstacle(places[0]):
        raise OSError(f"what is found cannot be written: {reason}; give --output DIR")
    for place in places:  # before the work that they would be in the way of
        try:
            result.read(place)
        except ValueError as error:
            raise UnreadableResultError(str(error)) from error
    evaluator = evaluators.of(detector.config)
    with _progress(console, detector, index) as advance:
        found = _found(evaluator, detector, index, weights, evaluators.by, advance)
    _print(console, detector, index, found)
    truth, detections = found.truth, found.detections
    _write(console, places, found.result, index, truth, detections)
    _explain(console, places[0], detector, index, found.result, truth, detections)
    use(index, truth, detections)
    return found


def loaded(path: Path, overrides: Sequence[str]) -> tuple[TrainedDetector, str]:
    """A detector and the digest of its weights, taken now: a run may delete the file at any moment."""
    detector = load_detector(path, overrides=overrides)
    return detector, weights_digest(detector.path)


def _every_detector(
    run_directory: Path, overrides: list[str], console: Console, damaged: dict[Path, str]
) -> Iterator[tuple[TrainedDetector, str]]:
    """Load every checkpoint of a run, oldest first, until none is new. Prints which are gone; `damaged` gets errors.

    Raises FileNotFoundError without any, and errors in the overrides.
    """
    done: set[Path] = set()
    if not checkpoints(run_directory):
        raise FileNotFoundError(f"{run_directory}: not a run directory with checkpoints/step_*; --all needs one")
    while waiting := [checkpoint for checkpoint in checkpoints(run_directory) if checkpoint not in done]:
        for checkpoint in waiting:
            try:
                found = loaded(checkpoint, overrides)
            except (OSError, ValueError) as error:
                if not checkpoint.exists():
                    console.print(f"{checkpoint} was deleted meanwhile: left out", soft_wrap=True)
                    continue
                if isinstance(error, ForeignSettingError) or (isinstance(error, ConfigError) and is_sound(checkpoint)):
                    raise
                damaged[checkpoint] = str(error)
                console.print(f"{checkpoint} cannot be evaluated, the others go on: {error}", soft_wrap=True)
            else:
                yield found
            done.add(checkpoint)


def is_sound(checkpoint: Path) -> bool:
    """Whether the checkpoint can be read without overrides, so that mistakes are theirs."""
    try:
        contents(checkpoint)
    except (OSError, ValueError):
        return False
    return True


def shards(data: str | Path | None, config: Config, file: Path, overrides: Sequence[str]) -> ShardIndex:
    """Open the shards to evaluate on: `data`, or the configuration's. file: of weights, which it came with."""
    if data is None:
        check_own(config, ["data.validation"], overrides, file)
    location = config.data.validation if data is None else Location(data)
    if location is None:
        raise ValueError(f"{file} names no shards to evaluate on: give --data SHARDS or data.validation=SHARDS")
    if location.is_remote:
        check_own(config, ["data.cache", "data.cache_bytes"], overrides, file)
    return open_shards(location, config.data)


def _found(
    evaluator: EvaluateShards,
    detector: TrainedDetector,
    index: ShardIndex,
    weights: str,
    by: str,
    advance: Callable[[int], None],
) -> Found:
    """Evaluate a set; each shard is scored when it comes. Raises SampleError for too many damaged images."""
    began, count, results = time.perf_counter(), Count(detector, index), {}
    for found in evaluator(detector, index, advance):
        assert found.shard not in results, f"shard {found.shard} was counted twice"
        results[found.shard] = found
        count.add(found)
    return Found(count.result(weights, began, by), [results[shard] for shard in sorted(results)], count.bad_samples)


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "- images/s")


@contextlib.contextmanager
def _progress(console: Console, detector: TrainedDetector, index: ShardIndex) -> Iterator[Callable[[int], None]]:
    with progress_bar(_ImagesPerSecond(), console=console) as progress:
        title = "evaluating" if detector.step is None else f"step {detector.step}"
        task = progress.add_task(title, total=index.num_samples)
        yield lambda images: progress.advance(task, images)


def places_of(file: Path, output: Path | None = None, each: bool = False, inside: str = "") -> list[Path]:
    """The folders to write to: first the one for all that is found, then the checkpoint's own, for the result alone.

    each: with output, a folder for each step. inside: the folder therein, for one of several sets.

    Raises ForeignSettingError for links.
    """
    checkpoint = file.parent
    if output is not None:
        return [(output / checkpoint.name if each else output) / inside]
    in_run = checkpoint.parent.name == "checkpoints"
    is_one = in_run or (checkpoint / MANIFEST).is_file()
    places = [result.folder_of(file) / inside, *[result.folder_of(file)] * bool(inside), *[checkpoint] * is_one]
    own = checkpoint.parent.parent if in_run else checkpoint
    check_links(own, *places, places[0] / failure_files.WORST, *[place.parent for place in places] * in_run)
    return places


def _write(
    console: Console,
    places: list[Path],
    found: Result,
    index: ShardIndex,
    truth: GroundTruth,
    detections: np.ndarray,
) -> None:
    folder, *checkpoints = places
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "detections.json", as_text(detections))
    write_whole(folder / "ground_truth.json", as_json(truth.to_coco(index.categories)).encode())
    result.write(folder, found)
    console.print(f"Written to {folder}", soft_wrap=True)
    for checkpoint in checkpoints:
        try:
            result.write(checkpoint, found)
        except OSError as error:
            if checkpoint.exists():  # its run may have deleted it meanwhile
                console.print(f"not beside the checkpoint: {error.filename}: {error.strerror}", soft_wrap=True)


def _explain(
    console: Console,
    folder: Path,
    detector: TrainedDetector,
    index: ShardIndex,
    found: Result,
    truth: GroundTruth,
    detections: np.ndarray,
) -> None:
    """Say and write where the detector fails, in place of what the folder has of an earlier evaluation."""
    failure_files.remove(folder)
    if found.num_not_finite:
        return
    began = time.perf_counter()
    rows = counted(detections, index.categories)
    about = {"protocol": index.protocol, "shards": index.location, "step": detector.step, "scores": found.metrics}
    if (failing := failures(truth, rows, index.categories, **about)) is not None:
        failure_files.write(console, folder, index, failing, detector.config.data.most_pixels)
        failure_files.show(console, folder, failing.analysis, time.perf_counter() - began)


def _print(console: Console, detector: TrainedDetector, index: ShardIndex, found: Found) -> None:
    scores = found.result
    for message in found.bad_samples[:SHOWN]:
        console.print(f"left out: {message}", soft_wrap=True)
    left_out = f", {scores.num_bad} of {index.num_samples} are damaged and left out" if scores.num_bad else ""
    console.print(
        f"{detector.path} on {scores.images} images of {index.location}{left_out}, in {scores.duration}, "
        f"{scores.where}",
        soft_wrap=True,
    )
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in scores.metrics.items():
        table.add_row(name, "not finite" if math.isnan(value) else f"{value:.4f}" if value >= 0 else "no such objects")
    console.print(table)
    if scores.departure:
        console.print(scores.departure, soft_wrap=True)
