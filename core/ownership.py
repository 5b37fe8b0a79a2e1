"""Privileged settings (`ORDERS`), and whether they are the user's own.

A configuration also comes with weights or in a run directory, perhaps an untrusted one. Most of it is data: sizes,
rates, folders to read. A few settings are privileged: they make a command run a program, open a connection or a port,
or write a folder. They count when the user gives them, on the command line or in a file of the user's, and not when a
checkpoint or a run directory has them. They need not be given twice: what a run of this user was trained with is
remembered, by digest, in a file of this account, and is the user's own from then on.
"""

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..data.addresses import shown
from ..data.location import Location
from ..data.text import visible
from .overrides import written

log = logging.getLogger("ddetr")


class ForeignSettingError(ValueError):
    """Privileged settings that came with a file and are not the user's own."""


# What each privileged setting does.
ORDERS = {
    "model.backbone": "fetches a model from elsewhere",
    "data.train": "runs a command or opens a connection",
    "data.validation": "runs a command or opens a connection",
    "data.cache": "writes and deletes files in a folder",
    "data.cache_bytes": "fills or empties the cache",
    "data.most_pixels": "lets an image take more or less memory",
    "train.initial_weights": "opens a connection",
    "train.output": "writes a folder",
    "train.name": "says which run of yours train.auto_resume continues",
    "train.auto_resume": "continues a run of yours, and deletes checkpoints of it",
    "train.deepspeed_extra": "tells DeepSpeed what to load and write",
    "eval.ray": "connects to a Ray cluster and runs programs there",
    "monitor.host": "opens a port to others",
    "monitor.port": "opens a port",
}
# What has to be given each time: another run would do just the same at it.
_NEVER_REMEMBERED = ("train.name", "train.auto_resume")


def orders(config: BaseModel, settings: Collection[str] = tuple(ORDERS)) -> dict[str, Any]:
    """Those of the settings whose values are privileged, and the values. config: the whole configuration."""
    values, defaults = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    found = {}
    for setting in settings:
        section, key = setting.split(".")
        value = values[section][key]
        if setting == "train.name" and not values["train"]["auto_resume"]:
            continue
        if value != defaults[section][key] and _is_order(setting, value):
            found[setting] = value
    return found


def _is_order(setting: str, value: Any) -> bool:
    """Of a value that is not the default: of these four only where it names something elsewhere."""
    if setting in ("data.train", "data.validation"):
        return Location(value).is_remote
    if setting == "train.initial_weights":
        return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value) is not None
    return setting != "model.backbone" or ":" in value or "/" in value


def check_own(config: BaseModel, settings: Collection[str], overrides: Iterable[str], source: str | Path) -> None:
    """Refuse privileged settings among `settings` that came with `source` and that the user has not given.

    settings: those that the command at hand is about to act on. overrides: section.key=value, as the user gave them.
    Raises ForeignSettingError that shows each with what it would do and how to allow it.
    """
    given = {override.partition("=")[0].strip() for override in overrides}
    own = _remembered()
    foreign = {
        key: value
        for key, value in orders(config, settings).items()
        if key not in given and (key in _NEVER_REMEMBERED or _digest(key, value) not in own)
    }
    if foreign:
        lines = [f"  {_written(key, value)}  ({ORDERS[key]})" for key, value in foreign.items()]
        exact = {
            key: value
            for key, value in foreign.items()
            if not is_shortened(value) and _written(key, value) == written(key, value)
        }
        repeated = " ".join(shlex.quote(_written(key, value)) for key, value in exact.items())
        lines += [f"If you want just that, add to the command: {repeated}"] if exact else []
        lines += (
            ["Logins and queries of addresses, and signs that are not drawn, are not shown here: give them yourself"]
            if exact != foreign
            else []
        )
        raise ForeignSettingError(
            f"{source} comes with {len(foreign)} setting(s) that are carried out only when you give them:\n"
            + "\n".join(lines)
            + "\nOtherwise add the same settings with values of your own, or put them into a file of your own "
            "(docs/operations.md, what is trusted)"
        )


def is_shortened(value: Any) -> bool:
    """Whether it is an address that is not shown as it is, or one that was written down so."""
    return isinstance(value, str) and (shown(value) != visible(value) or value.endswith("?..."))


def check_links(run_directory: Path, *written: Path) -> None:
    """Refuse to write to, or to delete in, what a run directory holds as a link to a place outside of it.

    Raises ForeignSettingError that names the link and where it leads.
    """
    for path in written:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ForeignSettingError(f"{path} is neither a file nor a folder, and this command would write to it")
        if path.is_symlink() and not path.resolve().is_relative_to(run_directory.resolve()):
            raise ForeignSettingError(
                f"{path} is a link to {path.resolve()}, where this command would write: put a folder or file of its "
                f"own in its place (the whole of {run_directory} may be a link)"
            )


def remember(config: BaseModel) -> None:
    """Remember the privileged settings of a run that this user starts as the user's own."""
    given = {key: value for key, value in orders(config).items() if key not in _NEVER_REMEMBERED}
    if new := {_digest(key, value) for key, value in given.items()} - _remembered():
        try:
            file = own_settings_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "w") as opened:  # one write: ranks of this machine do the same
                opened.write("\n" + "".join(f"{digest}\n" for digest in sorted(new)))  # after half a line, too
        except (OSError, RuntimeError) as error:
            log.warning(
                "what this run was given is not remembered (%s; XDG_STATE_HOME names another place): --resume and eval "
                "of it will ask for %s again",
                *(error, ", ".join(given)),
            )


def own_settings_file() -> Path:
    """$XDG_STATE_HOME/ddetr/own-settings, by default below ~/.local/state; it may be deleted."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "ddetr/own-settings"


def _remembered() -> set[str]:
    try:
        return set(own_settings_file().read_text(errors="replace").split())
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows this account's home
        log.warning(
            "what your earlier runs were given cannot be read (%s; XDG_STATE_HOME names another place), so it counts "
            "as a stranger's",
            error,
        )
        return set()


def _digest(key: str, value: Any) -> str:
    """Of a setting: what it says, a password perhaps, is nobody's business."""
    return hashlib.sha256(f"{key}={json.dumps(value, sort_keys=True)}".encode()).hexdigest()


def _written(key: str, value: Any) -> str:
    return visible(written(key, shown(value) if isinstance(value, str) else value))
