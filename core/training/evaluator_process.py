"""The process beside rank 0 that evaluates checkpoints, as rank 0 sees it. None of these calls waits, but `end`.

It reads its configuration from a file, then lines of JSON, one checkpoint at a time, and answers each with lines of
`Answer`. It may be slow, hang, die or print what is no answer.
"""

import contextlib
import json
import logging
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from ...data.text import visible
from ..config import Config, dump

log = logging.getLogger("ddetr")

ENDING_SECONDS = 5.0  # for it to give back what it has of the cluster, and again for the kernel to end it


@dataclass(frozen=True)
class Answer:
    """What the process writes. kind: "said", a line for the run's log, or how an evaluation has ended.

    text: the line, or why there is no result. again: whether it may be tried again. bad_samples: of "done".
    """

    kind: Literal["said", "done", "busy", "failed", "unreachable"]
    text: str = ""
    again: bool = True
    bad_samples: tuple[str, ...] = ()


_ANSWER = TypeAdapter(Answer)


class EvaluatorProcess:
    """The started process. Raises OSError when it cannot be started. printed: gets what it prints."""

    def __init__(self, command: Sequence[str], config: Config, printed: Path) -> None:
        printed.parent.mkdir(exist_ok=True)
        self._read = b""  # the beginning of a line
        self._babbled = False
        file = os.memfd_create("config.yaml")
        try:
            os.write(file, dump(config).encode())
            with printed.open("ab") as output:
                self._process = subprocess.Popen(
                    [*command, f"/proc/self/fd/{file}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    pass_fds=[file],
                    start_new_session=True,  # Ctrl-C is for the ranks
                )
        finally:
            os.close(file)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._answers.fileno(), False)
        os.set_blocking(self._orders.fileno(), False)

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def order(self, checkpoint: Path) -> None:
        """Have a checkpoint evaluated. Raises OSError where it has ended, or has not read the order before."""
        self._orders.write(json.dumps({"checkpoint": str(checkpoint)}).encode() + b"\n")
        self._orders.flush()

    def answers(self) -> list[Answer]:
        """What has come by now."""
        with contextlib.suppress(OSError):
            while chunk := self._answers.read(1 << 16):  # None for nothing yet, empty at the end
                self._read += chunk
        *lines, self._read = self._read.split(b"\n")
        found = []
        for line in lines:
            try:
                found.append(_ANSWER.validate_json(line))
            except ValidationError:  # printed by something in there
                if not self._babbled:
                    log.warning("the process that evaluates says what is no answer: %s", visible(repr(line[:80])))
                self._babbled = True
        return found

    def drop(self) -> None:
        """End it without a wait; `is_gone` says when that is done."""
        self._process.kill()
        for pipe in (self._orders, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()

    @property
    def is_gone(self) -> bool:
        return self.status is not None

    def end(self, *, at_work: bool) -> None:
        """End it, with time to give back what it has of the cluster. at_work: it does not look for orders now."""
        with contextlib.suppress(OSError):
            self._orders.close()
        if at_work:
            self._process.terminate()
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be stuck in the kernel: it ends when it can
                self._process.wait(ENDING_SECONDS)
        self._answers.close()
