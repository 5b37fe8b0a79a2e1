"""How fast DETR and Deformable DETR of one size learn: the paper's claim (its figure 3), in small.

    python benchmarks/convergence.py [--quick] [--rates] [--folder build/convergence] [--out build/convergence.png]

Draws procedural images in which nine of ten objects are small by COCO's rule (area below 32^2 pixels), trains every
model from scratch with several seeds, and plots AP and AP_small against epochs and against minutes of training. A run
is one `ddetr train` process with one thread; two of them share the machine. Finished runs are kept and not repeated.

The models have one backbone, width, depth and number of queries. DETR's feed-forward networks are wider, because its
attention has fewer parameters, so that all agree within 2 % in parameters and within 3 % in multiply-adds. Two models
stand between DETR and Deformable DETR, so that each differs from the next in one thing: the loss, the attention, the
number of scales. DETR and the single-scale model see C5 at stride 16 ("DC5", as in the paper's figure 3), Deformable
DETR sees strides 8, 16 and 32; a fourth level would have one pixel. Neither box refinement nor two stages. Batch,
schedule and epochs are the same for all. One run of DETR with the focal loss takes LONGER times as many epochs, with a
schedule as much longer: whether it learns at all.

Each model has a rate of its own, the best of those that `--rates` tries for half the epochs with another seed.
Minutes are the sum of the steps' own times: without start, checkpoints, evaluations, and steps in which the process
was stopped.
"""

import argparse
import collections
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from ddetr.core.config import load
from ddetr.core.model.cost import Cost, costs
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set
from ddetr.launch.history import read
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

mpl.use("Agg")
from matplotlib import pyplot, ticker

DRAWN, SEEN = 96, 64  # pixels: COCO's "small" is judged at the size that was drawn, the models see another
TRAINING_IMAGES, VALIDATION_IMAGES = 1600, 250
EPOCHS, EVALUATIONS, SEEDS = 6, 6, (1, 2, 3)
LONGER = 4  # times the epochs, for one more run of each DETR
AT_ONCE = 2  # runs of one thread
INTERRUPTED = 10  # times the usual step: a longer one, during which the process was stopped, counts as usual
MODEL = ("box_refine=false", "two_stage=false", "queries=20", "num_classes=3")
SETTINGS = (
    f"data.short_sides=[{SEEN}]",
    f"data.validation_short_side={SEEN}",
    "optim.warmup_steps=100",
    "train.zero_stage=0",
    "train.threads=1",
    "train.device=cpu",
    "train.log_every_steps=1",
    "train.checkpoint_every_epochs=0",
    "monitor.enabled=false",
)


@dataclass(frozen=True)
class Model:
    """One of those compared: what it changes of the preset `tiny`, its rate, and the rates that were tried."""

    name: str
    colour: str
    overrides: tuple[str, ...]
    rate: float
    rates: tuple[float, ...]

    @property
    def settings(self) -> list[str]:
        return [f"model.{setting}" for setting in MODEL] + list(self.overrides)


DC5 = ("model.levels=1", "model.dilation=true")
DETR = ("model.architecture=detr", *DC5, "model.feedforward_dim=288")
DEFORMABLE = Model("Deformable DETR", "tab:blue", ("model.levels=3",), 8e-4, (4e-4, 8e-4, 1.6e-3))
SINGLE_SCALE = Model("single scale", "tab:cyan", (*DC5, "model.feedforward_dim=384"), 4e-4, (2e-4, 4e-4, 8e-4))
FOCAL_DETR = Model("DETR, focal loss", "tab:orange", DETR, 2e-4, (1e-4, 2e-4, 4e-4))
PUBLISHED_DETR = Model(
    "DETR", "tab:gray", (*DETR, "model.classification=softmax", "optim.class_weight=1"), 2e-4, (1e-4, 2e-4, 4e-4)
)
MODELS = (DEFORMABLE, SINGLE_SCALE, FOCAL_DETR, PUBLISHED_DETR)
PATIENT = FOCAL_DETR  # trained once more, for LONGER times the epochs: it differs from the others in less


@dataclass(frozen=True)
class Run:
    model: Model
    rate: float
    seed: int
    epochs: int
    evaluate_every: int

    def overrides(self, shards: Path) -> list[str]:
        return [
            *self.model.settings,
            *SETTINGS,
            f"data.train={shards / 'train'}",
            f"data.validation={shards / 'val'}",
            f"optim.learning_rate={self.rate}",
            f"train.epochs={self.epochs}",
            f"train.evaluate_every_epochs={self.evaluate_every}",
            f"train.seed={self.seed}",
        ]


@dataclass(frozen=True)
class Curve:
    """What a run reached, evaluation after evaluation."""

    epochs: list[int]
    minutes: list[float]  # of training steps
    ap: list[float]
    ap_small: list[float]
    class_loss: float  # mean of the last epoch's, of the last layer and unweighted by the layers' number
    box_loss: float  # L1 and GIoU, likewise
    seconds_per_epoch: float


def curve(run_directory: Path) -> Curve | None:
    """The curve of a finished run; None when there is none."""
    if not (run_directory / "finished").exists():
        return None
    history = read(run_directory)
    steps, found = history.steps, history.evaluations
    usual = statistics.median(line["step_seconds"] for line in steps)
    seconds = [s if (s := line["step_seconds"]) < INTERRUPTED * usual else usual for line in steps]
    minutes = [sum(seconds[: line["step"]]) / 60 for line in found]
    last = [line["losses"] for line in steps if line["epoch"] == steps[-1]["epoch"]]
    layer = max(int(name.removeprefix("l1_")) for name in last[0] if name.startswith("l1_"))
    return Curve(
        epochs=[line["epoch"] + 1 for line in found],
        minutes=minutes,
        ap=[line["metrics"]["AP"] for line in found],
        ap_small=[line["metrics"]["AP_small"] for line in found],
        class_loss=statistics.mean(losses[f"class_{layer}"] for losses in last),
        box_loss=statistics.mean(losses[f"l1_{layer}"] + losses[f"giou_{layer}"] for losses in last),
        seconds_per_epoch=60 * minutes[-1] / (found[-1]["epoch"] + 1),
    )


def make_shards(folder: Path, training_images: int, validation_images: int) -> Path:
    """Draw and pack both sets, unless they are there; says how many objects are small."""
    for part, images, seed in (("train", training_images, 1), ("val", validation_images, 2)):
        drawn = folder / f"coco_{part}"
        annotations = draw_set(drawn, images=images, size=DRAWN, classes=3, seed=seed)
        pack(annotations, drawn / "images", folder / part, workers=AT_ONCE, shard_bytes=1 << 20)
    areas = [row["area"] for row in json.loads(annotations.read_text())["annotations"] if not row["iscrowd"]]
    small = sum(area < 32**2 for area in areas) / len(areas)
    print(
        f"{training_images} + {validation_images} images of {DRAWN} pixels, seen at {SEEN}; "
        f"{len(areas) / images:.1f} objects an image, {100 * small:.0f} % of them small",
        flush=True,
    )
    return folder


def train_all(runs: Iterable[Run], folder: Path, shards: Path) -> dict[Run, Curve]:
    """The curve of each run, training those that have none, several at once, with a bar for each."""
    runs = list(runs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(AT_ONCE) as pool:
        everything = progress.add_task("runs", total=len(runs))

        def one(run: Run) -> Curve:
            found = train(run, folder, shards, progress)
            progress.advance(everything)
            return found

        return dict(zip(runs, pool.map(one, runs), strict=True))


def train(run: Run, folder: Path, shards: Path, progress: Progress) -> Curve:
    """One run. Its directory is named by all of its settings, so that a changed one is another run.

    Raises RuntimeError when training fails or is interrupted.
    """
    overrides = run.overrides(shards)
    slug = re.sub(r"\W+", "-", run.model.name.lower())
    name = f"{slug}-{run.seed}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:8]}"
    directory = folder / name
    if done := curve(directory):
        return done
    shutil.rmtree(directory, ignore_errors=True)
    title = f"{run.model.name}, rate {run.rate:g}, seed {run.seed}, {run.epochs} epochs"
    bar = progress.add_task(title, total=None)
    command = [sys.executable, "-m", "ddetr.launch.cli", "train", "tiny", *overrides]
    command += [f"train.output={folder}", f"train.name={name}"]
    tail: collections.deque[str] = collections.deque(maxlen=20)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        tail.append(line)
        if step := re.search(r" step (\d+)/(\d+) ", line):
            progress.update(bar, completed=int(step[1]), total=int(step[2]))
    stopped_early = any("stopped after step" in line for line in tail)
    if process.wait() != 0 or stopped_early:
        raise RuntimeError(f"{title}: exited with status {process.returncode}\n{''.join(tail)}")
    shutil.rmtree(directory / "checkpoints")  # 50 MB each
    (directory / "finished").touch()
    progress.remove_task(bar)
    done = curve(directory)
    assert done is not None
    said = f"{title}: AP {done.ap[-1]:.3f} after {done.minutes[-1]:.1f} minutes of training"
    progress.console.print(said, soft_wrap=True)
    return done


def print_rates(curves: dict[Run, Curve]) -> None:
    print("\n| model | rate | AP | AP_small | class loss | box loss |\n| --- | --- | --- | --- | --- | --- |")
    for run, found in curves.items():
        losses = f"{found.class_loss:.3f} | {found.box_loss:.3f}"
        print(f"| {run.model.name} | {run.rate:g} | {found.ap[-1]:.3f} | {found.ap_small[-1]:.3f} | {losses} |")


def grouped(curves: dict[Run, Curve]) -> dict[tuple[Model, int], list[Curve]]:
    """The seeds' curves by model and number of epochs."""
    groups: dict[tuple[Model, int], list[Curve]] = {}
    for run, found in curves.items():
        groups.setdefault((run.model, run.epochs), []).append(found)
    return groups


def mean(rows: Iterable[list[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def spread(values: list[float]) -> str:
    middle = f"{statistics.mean(values):.3f}"
    return f"{middle} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else middle


def print_results(groups: dict[tuple[Model, int], list[Curve]], epochs: int) -> None:
    print("\n| model | parameters (M) | GFLOPs | rate |\n| --- | --- | --- | --- |")
    for model in MODELS:
        total = sum(costs(load("tiny", model.settings).model, (SEEN, SEEN)).values(), Cost(0, 0, 0))
        numbers = f"{total.num_trained / 1e6:.2f} | {total.num_multiply_adds / 1e9:.4f} | {model.rate:g}"
        print(f"| {model.name} | {numbers} |")
    goals = {model.name: mean(c.ap for c in groups[model, epochs])[-1] for model in (DEFORMABLE, PUBLISHED_DETR)}
    print("\nMean (least to most) of the seeds; last columns: epochs until the mean is another's AP at the end.\n")
    reached = " | ".join(f"epochs to {name}'s AP" for name in goals)
    print(f"| model | epochs | seconds an epoch | AP | best AP | AP_small | best AP_small | {reached} |")
    print("| --- " * (7 + len(goals)) + "|")
    for (model, count), found in groups.items():
        seconds = statistics.mean(c.seconds_per_epoch for c in found)
        numbers = [[c.ap[-1] for c in found], [max(c.ap) for c in found]]
        numbers += [[c.ap_small[-1] for c in found], [max(c.ap_small) for c in found]]
        means = list(zip(found[0].epochs, mean(c.ap for c in found), strict=True))
        until = [next((epoch for epoch, ap in means if ap >= goal), "-") for goal in goals.values()]
        print("| " + " | ".join(map(str, [model.name, count, f"{seconds:.1f}", *map(spread, numbers), *until])) + " |")


def draw(groups: dict[tuple[Model, int], list[Curve]], epochs: int, path: Path) -> None:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", sharey="row")
    for row, metric in zip(axes, ("ap", "ap_small"), strict=True):
        for axis, x in zip(row, ("epochs", "minutes"), strict=True):
            for (model, count), found in groups.items():
                longer = count != epochs
                for one in found if len(found) > 1 else ():
                    axis.plot(getattr(one, x), getattr(one, metric), color=model.colour, linewidth=0.7, alpha=0.5)
                axis.plot(
                    mean(getattr(one, x) for one in found),
                    mean(getattr(one, metric) for one in found),
                    "--" if longer else "-",
                    marker="o",
                    markersize=4,
                    color=model.colour,
                    label=f"{model.name}, {count // epochs} times the epochs" if longer else model.name,
                )
            axis.set(xlabel="epochs" if x == "epochs" else "minutes of training, one thread")
            axis.set(ylabel="AP" if metric == "ap" else "AP of small objects", xscale="log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.grid(which="both", alpha=0.2)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    seeds = max(len(found) for found in groups.values())
    figure.suptitle(f"Procedural images, models of one size, from scratch; mean and each of {seeds} seeds", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute: whether it runs, not what it shows")
    parser.add_argument("--rates", action="store_true", help="try learning rates instead")
    parser.add_argument("--folder", type=Path, default=Path("build/convergence"), help="of the data and the runs")
    parser.add_argument("--out", type=Path, default=Path("build/convergence.png"))
    options = parser.parse_args()
    folder: Path = options.folder / "quick" if options.quick else options.folder
    epochs, seeds, longer = (1, SEEDS[:1], 2) if options.quick else (EPOCHS, SEEDS, LONGER)
    shards = make_shards(folder / "data", *((64, 16) if options.quick else (TRAINING_IMAGES, VALIDATION_IMAGES)))
    if options.rates:
        half = max(1, epochs // 2)
        tried = [Run(model, rate, 0, half, half) for model in MODELS for rate in model.rates]
        print_rates(train_all(tried, folder / "runs", shards))
        return
    every = max(1, epochs // EVALUATIONS)
    runs = [Run(model, model.rate, seed, epochs, every) for seed in seeds for model in MODELS]
    runs.insert(0, Run(PATIENT, PATIENT.rate, seeds[0], longer * epochs, longer * every))  # takes the longest
    groups = grouped(train_all(runs, folder / "runs", shards))
    print_results(groups, epochs)
    draw(groups, epochs, options.out)
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
