"""Signals that stop a run."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from ddetr.core.training.signals import ignored_stop_signals, stop_signals


def until(happened: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_in_the_main_thread_a_signal_asks_to_stop_and_elsewhere_none_is_taken(capfd) -> None:
    before, asked = signal.getsignal(signal.SIGTERM), []
    with stop_signals(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: asked == [1, 1])
    assert capfd.readouterr().err == "SIGTERM: saving after this step, then stopping\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1

    taken = []

    def run() -> None:
        with stop_signals(lambda: None):
            taken.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert taken == [before]


def test_it_is_heard_while_the_main_thread_waits_outside_of_python() -> None:
    """As in a collective operation that another rank does not join."""
    library, mutex, asked = ctypes.CDLL(None), ctypes.create_string_buffer(64), []  # zeros are an open mutex

    def stop() -> None:
        asked.append(1)
        library.pthread_mutex_unlock(mutex)

    library.pthread_mutex_lock(mutex)
    too_late = threading.Timer(30, library.pthread_mutex_unlock, (mutex,))
    too_late.start()
    with stop_signals(stop):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        library.pthread_mutex_lock(mutex)  # which no signal interrupts
        in_time = list(asked)
    too_late.cancel()
    assert in_time == [1]


@pytest.mark.integration
def test_a_signal_to_a_forked_process_is_its_own() -> None:
    asked = []
    with stop_signals(lambda: asked.append(1)):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        time.sleep(0.2)
        assert asked == []
        if not (child := os.fork()):  # as a loader process, which may outlive the context
            time.sleep(60)
            os._exit(0)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_after_a_run_signals_are_ignored_for_a_while() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ignored_stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
