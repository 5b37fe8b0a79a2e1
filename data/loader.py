"""The worker processes of a torch DataLoader, ended in an order in which none of them is mistaken for lost.

torch checks the workers of all loaders at every SIGCHLD and raises in the main thread if one was killed. This loader
unregisters its workers from that check. It finds a dead worker itself, within seconds, when it waits for a batch, and
can kill a worker that does not end.
"""

import signal
from collections.abc import Generator
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from .shared_memory import FOLDER, REMEDY

Item = TypeVar("Item")
_REAP_SECONDS = 4.0  # for a killed process to be gone; one that hangs in a system call stays


class Loader(Generic[Item]):
    """One pass over the batches of a torch DataLoader, and its worker processes."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._workers: list[Any] = []  # multiprocessing's processes
        self._killed = False

    def batches(self) -> Generator[Item, None, None]:
        """Start the workers and yield batches; closing it asks the workers to end, and waits for them.

        Raises OSError when a worker was killed from outside, and what was raised in one.
        """
        iterator: Any = iter(self._loader)
        self._workers = getattr(iterator, "_workers", [])  # none where this process does the work
        if self._workers:
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        try:
            if not self._killed:  # while they were started
                yield from iterator
        except (RuntimeError, OSError, EOFError) as error:
            # What was being handed over fails in many ways, a little before the worker that it came from is gone.
            if self._workers:
                connection.wait([worker.sentinel for worker in self._workers], _REAP_SECONDS)
            if lost := [worker for worker in self._workers if worker.exitcode]:
                how = ", ".join(f"pid {worker.pid} {_how(worker.exitcode)}" for worker in lost)
                remedy = "If memory ran out, set data.workers to fewer; then start again"
                if any(worker.exitcode == -signal.SIGBUS for worker in lost):
                    remedy = f"{FOLDER} was full. {REMEDY}"
                raise OSError(f"a loader process was lost ({how}). {remedy}") from error
            raise
        finally:
            if self._workers:
                if self._killed:
                    self.kill()
                iterator._shutdown_workers()

    def kill(self) -> None:
        """End the workers at once, from any thread; who waits for a batch of theirs gets an error."""
        self._killed = True
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join(_REAP_SECONDS)


def _how(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with status {exit_code}"
