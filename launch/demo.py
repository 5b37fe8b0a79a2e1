"""`make demo`: the whole story on this machine, from drawing a data set to a report, in minutes.

Every stage runs the command that a user would type. Usage: python -m ddetr.launch.demo FOLDER
"""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from PIL import Image

from .history import read

SCRIPTS = Path(__file__).resolve().parent
DDETR = Path(sys.executable).with_name("ddetr")
TRAINING_IMAGES = 2800
VALIDATION_IMAGES = 300
RANKS = 2
NEEDED_AP50 = 0.65  # last measured: 0.76; another CPU's rounding may move it by some hundredths
STARTED = time.monotonic()


def demo(folder: Path) -> None:
    """Run all stages into `folder`, which must not exist. Raises RuntimeError when one fails or AP50 is too low."""
    if folder.exists():
        raise RuntimeError(f"{folder} exists already; name another folder")
    shards = {}
    for part, images, seed in (("train", TRAINING_IMAGES, 1), ("val", VALIDATION_IMAGES, 2)):
        coco, shards[part] = folder / f"coco_{part}", folder / "shards" / part
        stage(f"draw, pack and check {images} images ({part})")
        ddetr("data", "synth", coco, "--images", images, "--size", 128, "--classes", 3, "--seed", seed)
        ddetr("data", "pack", coco / "annotations.json", coco / "images", shards[part], "--shard-megabytes", 1)
        ddetr("data", "check", shards[part])

    run_directory = folder / "runs" / "tiny"
    stage(f"train on {RANKS} ranks with DeepSpeed ZeRO-2, scrape the metrics meanwhile")
    scrape = Scrape(run_directory / "targets.json")
    scrape.start()
    settings = [f"data.train={shards['train']}", f"data.validation={shards['val']}"]
    settings += [f"train.output={run_directory.parent}", f"train.name={run_directory.name}", "monitor.port=0"]
    run(SCRIPTS / "local.sh", "--ranks", RANKS, "tiny", *settings)
    if scrape.found is None:
        raise RuntimeError(f"no metrics could be scraped while training ({run_directory}/targets.json)")

    stage("evaluate on the held-out images with Ray")
    ddetr("eval", run_directory, "--ray")
    metrics = read(run_directory).evaluations[-1]["metrics"]

    stage("detect objects in held-out images, draw them")
    images = sorted((folder / "coco_val/images").iterdir())[:8]
    predictions = run_directory / "eval/predictions"  # where the report finds them
    ddetr("predict", run_directory, *images, "--output", predictions, "eval.score_threshold=0.3")
    picture = folder / "detections.png"
    grid(sorted(predictions.glob("*_detections.*")), picture)

    stage("write the report")
    ddetr("report", run_directory)

    stage("done")
    address, line = scrape.found
    print(f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} on {VALIDATION_IMAGES} held-out images")
    print(f"training took {training_seconds(run_directory):.0f} s; while it ran, {address} said: {line}")
    print(f"picture        {picture}")
    print(f"run directory  {run_directory}")
    print(f"report         {run_directory / 'report.html'}")
    if metrics["AP50"] < NEEDED_AP50:
        raise RuntimeError(f"AP50 is {metrics['AP50']:.3f}; this demo reaches at least {NEEDED_AP50} when all is well")


def training_seconds(run_directory: Path) -> float:
    """From the first logged step to the end of the run: without starting up."""
    history = read(run_directory)
    return history.events[-1]["time"] - history.steps[0]["time"]


class Scrape(threading.Thread):
    """Waits for the run to announce its metrics, then reads them until a step was counted."""

    def __init__(self, targets: Path) -> None:
        super().__init__(daemon=True)
        self.targets = targets
        self.found: tuple[str, str] | None = None  # address and one line of what it served

    def run(self) -> None:
        while self.found is None:
            time.sleep(2)
            if not self.targets.is_file():
                continue
            for group in json.loads(self.targets.read_text()):
                address = f"http://{group['targets'][0]}/metrics"
                try:
                    with urllib.request.urlopen(address, timeout=5) as response:
                        lines = response.read().decode().splitlines()
                except OSError:  # the run has ended or has not begun to serve: look again
                    continue
                for line in lines:
                    if line.startswith("ddetr_images_total") and float(line.rsplit(" ", 1)[1]) > 0:
                        self.found = (address, line)
                        print(f"scraped {address}: {line}", flush=True)
                        return


def grid(pictures: list[Path], output: Path, columns: int = 4, side: int = 300) -> None:
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * side, rows * side), "white")
    for position, path in enumerate(pictures):
        with Image.open(path) as picture:
            picture.thumbnail((side - 4, side - 4))
            canvas.paste(picture, (position % columns * side + 2, position // columns * side + 2))
    canvas.save(output)


def stage(title: str) -> None:
    print(f"\n== {time.monotonic() - STARTED:.0f} s: {title}", flush=True)


def ddetr(*arguments: object) -> None:
    run(DDETR, *arguments)


def run(*command: object) -> None:
    words = [str(word) for word in command]
    shown = " ".join(words if len(words) < 12 else [*words[:6], "...", *words[-2:]])
    print(f"$ {shown}", flush=True)
    status = subprocess.run(words, check=False).returncode
    if status != 0:
        raise RuntimeError(f"{words[0]} exited with status {status}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        demo(Path(sys.argv[1]))
    except RuntimeError as failure:
        sys.exit(f"demo: {failure}")
