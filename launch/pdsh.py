"""DeepSpeed's launcher over ssh (pdsh): `python -m ddetr.launch.pdsh HOSTFILE OPTION... -- train ...`.

DeepSpeed writes one line for the shell of every node: variables (its own choice of ours, and those of .deepspeed_env),
the folder, the interpreter, the arguments. Here all of them are quoted, so that they arrive as they are.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ..data.stream import STOP_SIGNALS
from .command_line import split_off
from .console import paragraph

# pdsh and ssh take other things for options, patterns or several hosts.
HOST = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.:-]*\s+slots=\d+\s*(#.*)?", re.ASCII)
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
HARMLESS = re.compile(r"[\w@%+=:,./-]*", re.ASCII)


def check_hostfile(file: Path) -> None:
    """Raise ValueError that names the first line that is not valid in a hostfile."""
    for number, line in enumerate(file.read_text(errors="surrogateescape").splitlines(), start=1):
        line = line.strip()
        if line and not line.startswith("#") and not HOST.fullmatch(line):
            raise ValueError(f"{file}:{number}: expected `HOST slots=RANKS`, got {line!r}")


def quoted(text: str) -> str:
    """One word for the shell of a node, behind pdsh, which replaces %h, %n and %u."""
    return shlex.quote(text).replace("%", "%%")


def _runner() -> type:
    """DeepSpeed's runner for pdsh, which here quotes everything that the nodes' shells read."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    class QuotingRunner(PDSHRunner):
        def add_export(self, key: str, var: str) -> None:
            name = key.strip()
            if not NAME.fullmatch(name):
                raise ValueError(f"the variable {name!r} cannot be set in the shells of the nodes: unset it")
            self.exports[name] = quoted(var if os.environ.get(key) == var else var.strip())  # the latter: a file's line

        def get_cmd(self, environment: dict[str, str], active_resources: dict) -> tuple[list, list, Any]:
            command, kill, environment = super().get_cmd(environment, active_resources)
            folder = os.path.abspath(".")
            ours = {f"cd {folder};": f"cd {quoted(folder)};", sys.executable: quoted(sys.executable)}
            exports = "".join(f"export {name}={value}; " for name, value in self.exports.items())
            left = [part for part in command if not HARMLESS.fullmatch(part) and part not in (exports, *ours)]
            if left or not ours.keys() <= set(command):
                raise ValueError(f"this version of DeepSpeed has the nodes' shells read what is not quoted: {left}")
            command = [ours.get(part, part) for part in command]
            # The brackets keep the pattern from finding the shell that runs it.
            pattern = (
                f"{re.escape(sys.executable)} -u -m deepspeed.launcher.launch --world_info[=]{self.world_info_base64}"
            )
            return command, [*kill[:-2], "pkill", "-f", quoted(pattern)], environment

    return QuotingRunner


def _told_to_stop() -> list[int]:
    """Pass STOP_SIGNALS on to the processes that DeepSpeed starts; returns the list to which those that come are added.

    On one host DeepSpeed's runner would end by itself and leave the ranks behind. On several it handles two of the
    signals itself, and the others are turned into one of these.
    """
    came: list[int] = []

    def tell_below(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()

    def turn_into_terminate(number: int, frame: FrameType | None) -> None:
        came.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    for number in STOP_SIGNALS:
        known = number in (signal.SIGTERM, signal.SIGINT)
        signal.signal(number, tell_below if known else turn_into_terminate)
    return came


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # DeepSpeed logs the command, which need not be UTF-8
    try:
        (hostfile, *options), word = split_off(sys.argv[1:])
        check_hostfile(Path(hostfile))
        from deepspeed.launcher import runner

        runner.PDSHRunner = _runner()
        options += ["--launcher", "pdsh", "--no_local_rank", "--module"]
        told = _told_to_stop()
        try:
            runner.main([f"--hostfile={hostfile}", *options, "ddetr.launch.command_line", word])
        finally:
            if told:  # as a shell has it; DeepSpeed ends with 1, whatever became of the ranks
                name = signal.Signals(told[0]).name
                print(f"ssh.sh: {name}: the ranks were told, and have ended", file=sys.stderr)
                sys.exit(128 + told[0])
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: DeepSpeed's, of a host that is not reached
        print(f"ssh.sh: {paragraph(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
