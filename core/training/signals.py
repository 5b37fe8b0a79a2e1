"""Signals that let a run save and stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ...data.stream import STOP_SIGNALS


@contextmanager
def stop_signals(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """A context in which the signals of a scheduler, a launcher or Ctrl-C (STOP_SIGNALS) call `ask_to_stop`."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main one only; as under Ray Tune
        yield
        return
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        came.append(number)
        ask_to_stop()
        if len(came) == 1:  # not by the log: this may have interrupted it in the middle of a line
            os.write(2, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())

    # One that is ignored already, such as a hangup under nohup, stays so.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
