"""The process beside rank 0 that has checkpoints evaluated on a Ray cluster.

Nothing of Ray is in a rank's process: a driver ends when its cluster's head is away for a minute. What is asked and
answered: core/training/evaluator_process.py.
"""

import contextlib
import json
import os
import select
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from ..core.checkpoint import load_detector
from ..core.config import Config, parse
from ..core.evaluation import result
from ..core.evaluation.result import Measure, weights_digest
from ..core.training.evaluator_process import Answer
from ..data.cache import open_shards
from .cluster import ClusterError
from .console import Terminal
from .evaluate import evaluate_detector, places_of
from .evaluators import Evaluators
from .follow import claimed

IDLE_SECONDS = 30.0  # after which the workers are given back
NICE = 10  # the ranks come first
OUT_OF_MEMORY_SCORE = 500  # of 1000: this process ends before a rank does


def main() -> None:
    """`python -m ddetr.launch.beside ADDRESS CONFIG.yaml`: answer the orders on standard input until it ends."""
    os.nice(NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OUT_OF_MEMORY_SCORE))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    address, file = sys.argv[1:]
    config = parse(Path(file).read_text(), "the run")
    with os.fdopen(os.dup(1), "w", buffering=1) as answers, os.fdopen(0, "rb", buffering=0) as orders:
        os.dup2(2, 1)  # what is printed goes where errors go
        console = Terminal()

        def tell(line: str) -> None:
            console.print(line)
            _say(answers, Answer("said", line))

        with Evaluators(address, console, by="train", report=tell) as evaluators:
            while True:
                if not select.select([orders], [], [], IDLE_SECONDS)[0]:
                    evaluators.release()
                if not (line := orders.readline()):
                    return
                _say(answers, _answer(Path(json.loads(line)["checkpoint"]), config, evaluators, console))


def _say(answers: TextIO, answer: Answer) -> None:
    answers.write(json.dumps(asdict(answer)) + "\n")


def _answer(checkpoint: Path, config: Config, evaluators: Evaluators, console: Terminal) -> Answer:
    """Evaluate the checkpoint, unless that is done; how it ended."""
    try:
        return _evaluated(checkpoint, config, evaluators, console)
    except ClusterError as error:
        answer = Answer("unreachable", str(error))
    except ValueError as error:
        answer = Answer("failed", str(error), again=False)
    except Exception as error:  # whatever it is, the next checkpoint may do better
        traceback.print_exc()
        answer = Answer("failed", f"{type(error).__name__}: {error}")
    if not checkpoint.exists():
        answer = Answer("failed", f"{checkpoint} was deleted meanwhile", again=False)
    console.print(answer.text)
    evaluators.release()
    return answer


def _evaluated(checkpoint: Path, config: Config, evaluators: Evaluators, console: Terminal) -> Answer:
    with claimed(checkpoint) as is_free:
        if not is_free:
            return Answer("busy")
        assert config.data.validation is not None
        index = open_shards(config.data.validation, config.data)
        measure = Measure.of(config, index)
        if any(found.measure == measure for found in result.read(checkpoint)):  # a follower was first
            return Answer("done")
        evaluators.of(config)  # before the weights are read, which a cluster that is away makes useless
        detector = load_detector(checkpoint, config=config)
        weights = weights_digest(detector.path)
        found = evaluate_detector(detector, weights, index, places_of(detector.path), evaluators, console)
    return Answer("done", bad_samples=tuple(found.bad_samples))


if __name__ == "__main__":
    main()
