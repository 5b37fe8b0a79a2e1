"""The process beside rank 0 that has checkpoints evaluated on a Ray cluster.

Nothing of Ray is in a rank's process: a driver ends when its cluster's head is away for a minute. What is asked and
answered: core/training/beside.py.
"""

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from ..core.checkpoint import load_detector
from ..core.config import Config, parse
from ..core.evaluation import result
from ..core.evaluation.result import Measure, weights_digest
from ..data.cache import open_shards
from .console import Terminal
from .evaluate import evaluate_detector, places_of
from .evaluators import Evaluators
from .follow import claimed

IDLE_SECONDS = 30.0  # after which the workers are given back
NICE = 10  # the ranks come first

Answer = dict[str, Any]


def command_of(address: str) -> list[str]:
    """Starts this process beside the calling one, with which it ends. address: of the Ray cluster."""
    return [sys.executable, "-m", f"{__package__}.lifeline", str(os.getpid()), f"{__package__}.beside", address]


def main() -> None:
    """Answer the orders on standard input until it ends."""
    os.nice(NICE)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with os.fdopen(os.dup(1), "w", buffering=1) as answers, os.fdopen(0, "rb", buffering=0) as orders:
        os.dup2(2, 1)  # what is printed goes where errors go
        config = parse(json.loads(orders.readline())["config"], "the run")
        console = Terminal()

        def tell(line: str) -> None:
            console.print(line)
            _say(answers, {"said": line})

        with Evaluators(sys.argv[1], console, by="train", report=tell) as evaluators:
            while True:
                if not select.select([orders], [], [], IDLE_SECONDS)[0]:
                    evaluators.release()
                if not (line := orders.readline()):
                    return
                _say(answers, _answer(Path(json.loads(line)["checkpoint"]), config, evaluators, console))


def _say(answers: TextIO, answer: Answer) -> None:
    answers.write(json.dumps(answer) + "\n")


def _answer(checkpoint: Path, config: Config, evaluators: Evaluators, console: Terminal) -> Answer:
    """Evaluate the checkpoint, unless that is done; how it ended."""
    try:
        return _evaluated(checkpoint, config, evaluators, console)
    except ConnectionError as error:
        answer = {"result": "unreachable", "why": str(error), "again": True}
    except (OSError, RuntimeError) as error:
        answer = {"result": "failed", "why": str(error), "again": True}
    except ValueError as error:
        answer = {"result": "failed", "why": str(error), "again": False}
    if not checkpoint.exists():
        answer = {"result": "failed", "why": f"{checkpoint} was deleted meanwhile", "again": False}
    console.print(answer["why"])
    evaluators.release()
    return answer


def _evaluated(checkpoint: Path, config: Config, evaluators: Evaluators, console: Terminal) -> Answer:
    with claimed(checkpoint) as is_free:
        if not is_free:
            return {"result": "busy"}
        assert config.data.validation is not None
        index = open_shards(config.data.validation, config.data)
        measure = Measure.of(config, index)
        if any(found.measure == measure for found in result.read(checkpoint)):  # a follower was first
            return {"result": "done", "bad_samples": []}
        detector = load_detector(checkpoint, config=config)
        weights = weights_digest(detector.path)
        found = evaluate_detector(detector, weights, index, places_of(detector.path), evaluators, console)
    return {"result": "done", "bad_samples": found.bad_samples}


if __name__ == "__main__":
    main()
