"""The identity of a run: its name, and random digits that its folder keeps through every resume, wherever that is.

Runs of one name in two folders, of two users or on two machines are two runs to Prometheus.
"""

import json
import logging
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.documents import parse_json
from ..data.files import write_whole
from ..data.text import visible

log = logging.getLogger("ddetr")

FILE = "identity.json"
_DIGITS = 8
_IDENTITY = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


@dataclass(frozen=True)
class Identity:
    """identity: eight random hexadecimal digits. folder: where the run was when it last began."""

    identity: str
    folder: str

    @property
    def label(self) -> str:
        """The value of the label `run` in all its Prometheus series and in targets.json."""
        return f"{visible(Path(self.folder).name)}@{self.identity}"

    def write(self) -> None:
        write_whole(Path(self.folder) / FILE, json.dumps(asdict(self)).encode())


def identify(run_directory: Path) -> Identity:
    """Read the identity of a run from its folder, or make a new one; nothing is written.

    A folder that was moved is the same run, a copy of an original that is still there another one.
    """
    folder, found = run_directory.resolve(), _read(run_directory)
    original = None if found is None or found.folder == str(folder) else _read(Path(found.folder))
    if found is None or (original is not None and original.identity == found.identity):
        return Identity(secrets.token_hex(_DIGITS // 2), str(folder))
    return Identity(found.identity, str(folder))


def _read(run_directory: Path) -> Identity | None:
    file = run_directory / FILE
    if not file.is_file():
        return None
    try:
        found = Identity(**parse_json(file.read_bytes()))
        if not _IDENTITY.fullmatch(found.identity) or not isinstance(found.folder, str):
            raise ValueError("not the identity of a run")
        return found
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s): to Prometheus this is another run than before", file, error)
        return None
