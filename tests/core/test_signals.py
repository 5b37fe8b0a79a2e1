"""Signals that stop a run."""

import os
import signal
import threading

from ddetr.core.training.signals import stop_signals


def test_in_the_main_thread_a_signal_asks_to_stop_and_elsewhere_none_is_taken(capfd) -> None:
    before, asked = signal.getsignal(signal.SIGTERM), []
    with stop_signals(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked == [1, 1]
    assert capfd.readouterr().err == "SIGTERM: saving after this step, then stopping\n"
    assert signal.getsignal(signal.SIGTERM) is before

    taken = []

    def run() -> None:
        with stop_signals(lambda: None):
            taken.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert taken == [before]
