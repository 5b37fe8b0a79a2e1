"""One rank of a run on a Ray cluster: `ddetr train` in a process of its own, and the Ray actor that starts it."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass
from typing import TextIO

from . import lifeline


@dataclass(frozen=True)
class Place:
    """Where an actor is: Ray's name of the node, the address by which other nodes know it, and its GPUs."""

    node: str
    address: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a rank wrote since the last answer, each line with whether it is on stderr, and its exit status if any."""

    lines: list[tuple[bool, str]]
    exit_status: int | None


class Rank:
    """The Ray actor of one rank, with its resources. No method waits for the training, so that a stop is heard."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._lines: list[tuple[bool, str]] = []
        self._lock = threading.Lock()

    def place(self) -> Place:
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(str(number) for number in context.get_accelerator_ids().get("GPU", ()))
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), gpus)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, config: str, environment: dict[str, str], options: list[str]) -> None:
        """Start `ddetr train` with this configuration (YAML), these variables added to the actor's, these options."""
        environment = {"PYTHONUNBUFFERED": "1", **os.environ, **environment}
        file = os.memfd_create("config.yaml")  # leaves nothing behind, however this process ends
        try:
            os.write(file, config.encode())
            self._process = subprocess.Popen(
                lifeline.command("cli", "train", f"/proc/self/fd/{file}", *options),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=[file],
                start_new_session=True,  # a Ctrl-C in Ray's terminal is not for it; and it ends with its children
            )
        finally:
            os.close(file)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for stream, is_error in ((self._process.stdout, False), (self._process.stderr, True)):
            reader = threading.Thread(target=self._read, args=(stream, is_error), daemon=True)
            reader.start()
            self._readers.append(reader)

    def poll(self) -> Answer:
        assert self._process is not None, "polled before it was started"
        exit_status = self._process.poll()
        if exit_status is not None:
            for reader in self._readers:
                reader.join(timeout=2)  # a child that outlives the rank may hold its output open
        with self._lock:
            lines, self._lines = self._lines, []
        return Answer(lines, exit_status)

    def send(self, number: int) -> None:
        """A signal to the rank; SIGKILL also to its children, and it is gone when this returns."""
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def _read(self, stream: TextIO, is_error: bool) -> None:
        for line in stream:
            with self._lock:
                self._lines.append((is_error, line.rstrip("\n")))
