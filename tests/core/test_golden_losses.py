"""Twenty steps of the tiny preset, digit for digit: a refactoring proves itself here.

A change that is meant to change the numbers writes the file anew: `python -m tests.core.test_golden_losses`.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.core.runs import collect, command, succeeded

pytestmark = pytest.mark.integration

FILE = Path(__file__).resolve().parent.parent / "golden/tiny_losses.json"
PARTS = ("total", "class", "l1", "giou")


def machine() -> dict[str, str]:
    """What rounding depends on: libraries choose their kernels by it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    return {"torch": torch.__version__, "cpu": f"{vendor} {torch.backends.cpu.get_cpu_capability()}"}


def tiny_losses(folder: Path) -> list[dict[str, float]]:
    from ddetr.data.shards import pack
    from ddetr.launch.data import synth

    synth(folder / "coco", 24, 128, 3, 7)
    pack(folder / "coco/annotations.json", folder / "coco/images", folder / "shards", workers=1)
    settings = ["train.max_steps=20", "train.epochs=10", "train.zero_stage=0", "train.log_every_steps=1"]
    settings += ["train.threads=1", "train.name=golden", f"train.output={folder}", f"data.train={folder / 'shards'}"]
    settings += ["train.evaluate_every_epochs=0", "train.checkpoint_every_epochs=0", "monitor.port=0"]
    finished = subprocess.run(command(1, "tiny", *settings), capture_output=True, text=True, timeout=600)
    run = succeeded(collect(folder / "golden", finished.stdout + finished.stderr, finished.returncode))
    return [
        {part: step["losses"][part] for part in PARTS} | {"gradient_norm": step["gradient_norm"]} for step in run.steps
    ]


def test_tiny_losses_are_the_recorded_ones(tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text())
    losses = tiny_losses(tmp_path)
    assert len(losses) == len(golden["steps"]) == 20
    if machine() == golden["machine"]:
        assert losses == golden["steps"]
        return
    for number, (ours, recorded) in enumerate(zip(losses, golden["steps"], strict=True)):
        tolerance = 1e-4 if number < 5 else 0.1  # elsewhere other kernels round otherwise, and training magnifies it
        assert ours["total"] == pytest.approx(recorded["total"], rel=tolerance), f"step {number + 1}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recorded = {"machine": machine(), "steps": tiny_losses(Path(folder))}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{FILE}: last loss {recorded['steps'][-1]['total']}", file=sys.stderr)
