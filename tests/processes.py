"""`ddetr` in real processes, forked from one that has imported torch, DeepSpeed and ddetr.

A fresh Python takes ten seconds of one core for these imports; a forked one takes none. It is a process like any other,
with arguments, environment, signals, exit status and output of its own; only variables that are read at an import are
those of the tests. What a command is like from the shell, imports and launchers included, is looked at by
tests/launch/test_cli.py, test_torchrun.py and test_packaging.py.
"""

import contextlib
import datetime
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil

_context = multiprocessing.get_context("forkserver")
APPEND = os.O_WRONLY | os.O_APPEND
_context.set_forkserver_preload(["tests.preloaded"])


class Command:
    """A started `ddetr ARGUMENT...`, of one process or of several ranks, with the methods of a Popen of text.

    ranks: processes that share one run, as a launcher starts them. One is started as a user does, without a launcher.
    environment: set in it besides the variables of this process. folder: where it works.
    program: a Python file to run in the place of `ddetr`. first: what the process calls before that, such as a function
    of tests/confinement.py; sent as a pickle.
    """

    def __init__(
        self,
        *arguments: str | Path,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        program: Path | None = None,
        first: Callable[[], object] = bool,
    ) -> None:
        self.args = [*map(str, arguments)]
        sys.audit("subprocess.Popen", "ddetr", self.args, folder, environment)
        self._outputs = [tempfile.NamedTemporaryFile(prefix="ddetr-") for _ in ("stdout", "stderr")]  # noqa: SIM115
        self._store: Any = None  # where the ranks meet: as torchrun, it listens as long as they run
        places = self._places(ranks) if ranks > 1 else [{}]
        self.processes = [
            _context.Process(
                target=_become,
                args=(
                    program,
                    self.args,
                    {**os.environ, **(environment or {}), **place},
                    os.fspath(folder or Path.cwd()),
                    [file.name for file in self._outputs],
                    first,
                ),
            )
            for place in places
        ]
        for process in self.processes:
            process.start()

    def _places(self, ranks: int) -> list[dict[str, str]]:
        from ddetr.core.training.network import LOOPBACK, hosted_store

        self._store, port = hosted_store(LOOPBACK, 0, datetime.timedelta(seconds=60))
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]

    @property
    def pid(self) -> int:
        """Of rank 0."""
        assert self.processes[0].pid is not None
        return self.processes[0].pid

    @property
    def stdout(self) -> str:
        """What all ranks have written so far to standard output."""
        return Path(self._outputs[0].name).read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return Path(self._outputs[1].name).read_text(errors="replace")

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def returncode(self) -> int | None:
        """That of the first rank that failed, negative for a signal; None while one runs."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Raises subprocess.TimeoutExpired, with the output."""
        deadline = time.monotonic() + timeout
        while running := [process.sentinel for process in self.processes if process.exitcode is None]:
            if not connection.wait(running, max(0.0, deadline - time.monotonic())):
                raise subprocess.TimeoutExpired(self.args, timeout, self.output)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, None]:
        self.wait(timeout)
        return self.output, None

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid or 0, number)

    def kill(self) -> None:
        """All ranks, and all that they started."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
        self.wait()


def finished(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A Command that has ended. Kills it after ten minutes."""
    command = Command(*arguments, **settings)
    try:
        status = command.wait()
    except subprocess.TimeoutExpired:
        command.kill()
        raise
    return subprocess.CompletedProcess(command.args, status, command.stdout, command.stderr)


def _become(
    program: Path | None,
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: str,
    outputs: Sequence[str],
    first: Callable[[], object],
) -> None:
    """What a forked process does."""
    for target, name, mode in ((0, os.devnull, os.O_RDONLY), *((n, name, APPEND) for n, name in enumerate(outputs, 1))):
        os.dup2(os.open(name, mode), target)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # the default again, for what it starts itself
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(program or "ddetr"), *arguments]
    first()
    if program is None:
        from ddetr.launch.cli import main

        main()
    else:
        runpy.run_path(str(program), run_name="__main__")
