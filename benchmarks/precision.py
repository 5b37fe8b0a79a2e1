"""Whether half precision trains as well as float32: the AP of the tiny preset, several seeds each.

    python benchmarks/precision.py [--images 2800] [--epochs 3] [--seeds 3] [--gpu] [--out build/precision]

Each run is a `ddetr train tiny` on the demo's procedural images (one rank; without a GPU one thread, two runs at a
time), evaluated once at the end. fp16 runs with --gpu only: DeepSpeed does not compute in it on most CPUs. Finished
runs are kept in the output folder and not made again. The difference counts as noise when it is smaller than twice its
standard error over the seeds.
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ddetr.launch.history import read

DDETR = [sys.executable, "-m", "ddetr.launch.cli"]
SCORES = ("AP", "AP50", "AP_small")
VALIDATION_IMAGES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--images", type=int, default=2800)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/precision"))
    options = parser.parse_args()
    precisions = ["fp32", "bf16", *(["fp16"] if options.gpu else [])]
    folder = options.out / f"{options.images}x{options.epochs}{'_gpu' if options.gpu else ''}"
    shards = {part: shards_of(folder, part, n) for part, n in (("train", options.images), ("val", VALIDATION_IMAGES))}
    runs = [(precision, seed) for seed in range(1, options.seeds + 1) for precision in precisions]
    with ThreadPoolExecutor(1 if options.gpu else 2) as pool:
        done = list(pool.map(lambda run: scores(folder, shards, run[0], run[1], options.epochs, options.gpu), runs))

    device = torch.cuda.get_device_name() if options.gpu else platform.processor() or platform.machine()
    print(f"{device}, torch {torch.__version__}, {datetime.date.today()}: `{' '.join(sys.argv)}`\n")
    print(
        "| precision | "
        + " | ".join(f"{score} (mean; each seed)" for score in SCORES)
        + " | difference of AP from fp32 |"
    )
    print("| --- " * (len(SCORES) + 2) + "|")
    ap = {
        p: [found["AP"] for (precision, _), found in zip(runs, done, strict=True) if precision == p] for p in precisions
    }
    for precision in precisions:
        cells = []
        for score in SCORES:
            values = [found[score] for (p, _), found in zip(runs, done, strict=True) if p == precision]
            cells.append(f"{statistics.mean(values):.3f}; " + ", ".join(f"{value:.3f}" for value in values))
        cells.append("" if precision == "fp32" else difference(ap[precision], ap["fp32"]))
        print(f"| {precision} | " + " | ".join(cells) + " |")


def difference(values: list[float], reference: list[float]) -> str:
    mean = statistics.mean(values) - statistics.mean(reference)
    error = ((statistics.variance(values) + statistics.variance(reference)) / len(values)) ** 0.5
    return f"{mean:+.3f} ± {error:.3f}: {'within noise' if abs(mean) <= 2 * error else 'NOT within noise'}"


def shards_of(folder: Path, part: str, images: int) -> Path:
    shards = folder / "shards" / part
    if not (shards / "index.json").is_file():
        coco = folder / f"coco_{part}"
        size = ["--size", "128", "--classes", "3", "--seed", "1" if part == "train" else "2"]
        command([*DDETR, "data", "synth", str(coco), "--images", str(images), *size])
        command([*DDETR, "data", "pack", str(coco / "annotations.json"), str(coco / "images"), str(shards)])
    return shards


def scores(
    folder: Path, shards: dict[str, Path], precision: str, seed: int, epochs: int, gpu: bool
) -> dict[str, float]:
    run = folder / f"{precision}_{seed}"
    if not (run / "done").is_file():
        print(f"training in {precision}, seed {seed}: {run}", file=sys.stderr, flush=True)
        settings = [f"data.train={shards['train']}", f"data.validation={shards['val']}", f"train.epochs={epochs}"]
        settings += [f"train.output={folder}", f"train.name={run.name}", f"train.precision={precision}"]
        settings += [f"train.seed={seed}", "train.zero_stage=1", f"train.evaluate_every_epochs={epochs}"]
        settings += ["monitor.enabled=false", "train.device=cuda" if gpu else "train.device=cpu", "train.threads=1"]
        command([*DDETR, "train", "tiny", *settings, "train.auto_resume=true"])
        (run / "done").touch()
    return read(run).evaluations[-1]["metrics"]


def command(words: list[str]) -> None:
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{(result.stdout + result.stderr)[-2000:]}")


if __name__ == "__main__":
    main()
