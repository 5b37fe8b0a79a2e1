"""What tests/processes.py imports once for all the processes that it forks. No import here starts a thread."""

import importlib
import os
from pathlib import Path

COMMANDS = ("checkpoint", "cli", "data", "evaluate", "predict", "report", "statistics", "train")
# DeepSpeed imports the second with its engine, which imports torch's compiler.
ENGINE = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")

if not Path("/dev/nvidiactl").exists():  # with a GPU, DeepSpeed would take it before the fork, and for all
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ENGINE:
        importlib.import_module(name)
for name in COMMANDS:
    importlib.import_module(f"ddetr.launch.{name}")
