"""Signals that let a run save and stop."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ...data.stream import STOP_SIGNALS


@contextmanager
def stop_signals(
    ask_to_stop: Callable[[], None], said: str = "saving after this step, then stopping"
) -> Iterator[None]:
    """A context in which the signals of a scheduler, a launcher or Ctrl-C (STOP_SIGNALS) call `ask_to_stop`.

    A thread calls it: the main one may be in a collective operation, which ends only when the others know of the stop.
    said: what is printed at the first signal.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main one only; as under Ray Tune
        yield
        return
    # One that is ignored already, such as a hangup under nohup, stays so.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    heard, told = socket.socketpair()
    told.setblocking(False)

    def listen() -> None:
        came = 0
        while number := heard.recv(1):  # empty when the context ends
            if number[0] not in numbers:
                continue
            ask_to_stop()
            came += 1
            if came == 1:  # not by the log: somebody may hold its lock
                os.write(2, f"{signal.Signals(number[0]).name}: {said}\n".encode())

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    before = {number: signal.signal(number, _ignore) for number in numbers}
    wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    _inherited.add(told.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        _inherited.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        told.shutdown(socket.SHUT_WR)  # closed alone it would stay open in the processes that were forked meanwhile
        listener.join()
        told.close()
        heard.close()


@contextmanager
def ignored_stop_signals() -> Iterator[None]:
    """A context for the end of a run: a launcher that sees the first rank end signals the others, which end as well."""
    before = ignore_stop_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> dict[int, Any]:
    """Ignore them from now on; returns the handlers of before. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}


_inherited: set[int] = set()  # the socket to which signals are written, which a forked process has, too


def _deafen() -> None:
    """In a forked process: signals to it are not for the one that it comes from."""
    if _inherited:
        signal.set_wakeup_fd(-1)
        _inherited.clear()


os.register_at_fork(after_in_child=_deafen)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread has heard of it."""
