"""What evaluation beside training costs the training step, against a run that does not evaluate.

    python benchmarks/beside.py                 # two cores: one trains, a Ray node on the other one evaluates

Four runs take turns, each from the same seed with the same steps and checkpoints: one evaluates nothing, two have
`eval.ray`, one evaluates by its rank, so that training stands still. The rank has one core and one thread, the Ray node
the other core. The process beside the rank, which connects to Ray, adds up scores and draws the worst images, shares
the rank's core as it does by default, with a lower priority; in one of the runs it is on the other core as well. Step
times are those that the run records. "Waited" is all that the training thread spends on evaluation: handing checkpoints
over, looking for answers after each step, and reporting results, over all steps.
"""

import argparse
import datetime
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set

NONE, BESIDE, APART, WITHIN = "no evaluation", "eval.ray", "eval.ray, its process on the other core", "by the rank"
EVERY = 40  # epochs of 6 steps
MODEL = ["model.backbone=test_resnet.r160_in1k", "model.hidden_dim=64", "model.heads=4", "model.encoder_layers=1"]
MODEL += ["model.decoder_layers=2", "model.feedforward_dim=64", "model.queries=12", "data.short_sides=[96]"]
MODEL += ["data.validation_short_side=96", "train.batch_size=4", "train.log_every_steps=1", "train.threads=1"]
MODEL += ["train.precision=fp32", "train.device=cpu", "monitor.enabled=false", "data.workers=0"]
# In the place of `ddetr`: the time that the training thread spends in Beside.
PROGRAM = """
import json, sys, time
from pathlib import Path
from ddetr.core.training.beside import Beside
from ddetr.launch import train
from ddetr.launch.cli import main

if len(sys.argv) > 2 and sys.argv[1].startswith("--core="):
    before = ["taskset", "-c", sys.argv.pop(1).removeprefix("--core=")]
    command = train.lifeline.command
    train.lifeline.command = lambda *of: [*before, *command(*of)]

spent, observe = [], Beside.observe
def timed(self, report):
    began = time.perf_counter()
    observe(self, report)
    spent.append(time.perf_counter() - began)
Beside.observe = timed
try:
    main()
finally:
    Path(sys.argv[0]).with_suffix(".json").write_text(json.dumps(spent))
"""


def main() -> None:
    """Run and print the table of benchmarks/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=960)
    options = parser.parse_args()
    if len(cores := sorted(os.sched_getaffinity(0))) < 2:
        sys.exit("it needs two cores")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        for name, images, seed in (("train", 24, 7), ("validation", 240, 11)):
            draw_set(place / name / "coco", images=images, size=96, classes=3, seed=seed, workers=1)
            coco = place / name / "coco"
            pack(coco / "annotations.json", coco / "images", place / name / "shards", workers=1, shard_bytes=100 << 10)
        runs: dict[str, list[dict]] = {name: [] for name in (NONE, BESIDE, APART, WITHIN)}
        with ray_node(place, cores[1]) as address:
            for number in range(options.rounds):
                for name in (*list(runs)[number:], *list(runs)[:number]):  # none is always the first
                    runs[name].append(one_run(place, name, number, options.steps, address, cores))
                    print(f"{name}: {json.dumps(runs[name][-1])}", file=sys.stderr, flush=True)
    report(runs, options.steps)


@contextmanager
def ray_node(place: Path, core: int) -> Iterator[str]:
    port = free_port()
    line = ["taskset", "-c", str(core), sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    line += ["--num-cpus=1", f"--port={port}", f"--temp-dir={place}/ray", "--node-ip-address=127.0.0.1"]
    line += ["--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"]
    line += [f"--ray-client-server-port={free_port()}"]
    printed = place / "ray.log"
    with printed.open("w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
    try:
        while "Ray runtime started" not in printed.read_text():
            assert process.poll() is None, printed.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def one_run(place: Path, name: str, number: int, steps: int, address: str, cores: list[int]) -> dict:
    """Seconds of the steps after the first evaluation is handed over, and of the whole run."""
    program, run = place / "program.py", f"{re.sub(r'[^a-z]+', '-', name.lower())}-{number}"
    program.write_text(PROGRAM)
    settings = [f"data.train={place}/train/shards", f"data.validation={place}/validation/shards"]
    settings += [f"train.output={place}/runs", f"train.name={run}", "train.epochs=100000", f"train.max_steps={steps}"]
    settings += [f"train.checkpoint_every_epochs={EVERY}", "train.keep_checkpoints=2"]
    settings += [f"train.evaluate_every_epochs={0 if name == NONE else EVERY}"]
    settings += [f"eval.ray={address}"] if name in (BESIDE, APART) else []
    began = time.perf_counter()
    line = ["taskset", "-c", str(cores[0]), sys.executable, program]
    line += [f"--core={cores[1]}"] if name == APART else []
    line += ["train", "tiny", *MODEL, *settings]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    wall = time.perf_counter() - began
    lines = [json.loads(text) for text in (place / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    first = EVERY * 6
    taken = [line["step_seconds"] for line in lines if line["kind"] == "step" and line["step"] > first]
    spent = json.loads(program.with_suffix(".json").read_text())
    times = [line["time"] for line in lines if line["kind"] == "step"]
    return {
        "median_ms": 1e3 * statistics.median(taken),
        "mean_ms": 1e3 * statistics.mean(taken),
        "training_s": times[-1] - times[0],
        "wall_s": wall,
        "handed_over": 0 if name == NONE else steps // first,
        "evaluations": sum(line["kind"] == "evaluation" for line in lines),
        "waited_s": sum(spent),
        "longest_s": max(spent, default=0.0),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def report(runs: dict[str, list[dict]], steps: int) -> None:
    """Ratios to the run without evaluation; each number is the median of the rounds, a step's also the least."""
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {datetime.date.today()}, {steps} steps, {len(runs[NONE])} rounds\n")
    columns = (
        "| | step: median | ratio | least | ratio | step: mean | ratio | all steps | evaluated meanwhile | waited |"
    )
    print(columns, "| --- " * columns.count("|", 1) + "|", sep="\n")

    def middle(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    def least(name: str) -> float:
        return min(run["median_ms"] for run in runs[name])

    for name in runs:
        waited = f"{1e3 * middle(name, 'waited_s') / max(middle(name, 'handed_over'), 1):.1f} ms for each"
        step, base = middle(name, "median_ms"), middle(NONE, "median_ms")
        done = f"{middle(name, 'evaluations'):g} of {middle(name, 'handed_over'):g}"
        print(
            f"| {name} | {step:.1f} ms | {step / base:.3f} "
            f"| {least(name):.1f} ms | {least(name) / least(NONE):.3f} "
            f"| {middle(name, 'mean_ms'):.1f} ms | {middle(name, 'mean_ms') / middle(NONE, 'mean_ms'):.3f} "
            f"| {middle(name, 'training_s'):.1f} s | {done} "
            f"| {waited if name in (BESIDE, APART) else '-'} |"
        )


if __name__ == "__main__":
    main()
