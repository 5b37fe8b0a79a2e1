"""Saves one checkpoint after the other, from the step after STEP, into FOLDER, and tells each step: FOLDER STEP."""

import sys
from pathlib import Path

import numpy as np
from ddetr.core.checkpoint.manifest import write_checkpoint
from ddetr.core.training.saving import prune
from safetensors.numpy import save_file

if __name__ == "__main__":
    folder, step = Path(sys.argv[1]), int(sys.argv[2])

    def write(checkpoint: Path) -> None:
        for name in ("model.safetensors", "training.safetensors"):
            save_file({str(n): np.full((2000, 50), step, dtype=np.float32) for n in range(8)}, checkpoint / name)

    while True:
        step += 1
        write_checkpoint(folder / f"step_{step:08d}", 1, write, {"step": step})
        prune(sorted(folder.glob("step_*")), 2)
        print(step, flush=True)
