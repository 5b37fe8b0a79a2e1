"""`ddetr config`: presets listed, a resolved configuration, settings explained, two configurations compared."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from ..core.config import Config, dump, gives_classes, load, preset_names, without_logins
from ..core.glossary import Entry, entries, found, section_names
from ..core.layers import preset_summary
from ..core.overrides import in_one_line
from ..data.text import visible
from .console import Terminal, brief

CLASSES = "model.num_classes"
COLUMN = 32  # characters that a value may take without moving the column behind it
HINTS = """
ddetr config r50                         the whole configuration of a preset
ddetr config r50 mine.yaml train.seed=7  with a file and a setting on top of it
ddetr config --explain optim.clip_norm   what a setting means; of a section, all
ddetr config --diff r50 runs/mine        what differs between two"""


def list_presets() -> None:
    console = _console()
    names = preset_names()
    width = max(map(len, names)) + 2
    for name in names:
        first, *more = textwrap.wrap(preset_summary(name), console.width - width) or [""]
        console.print(Text.assemble((name.ljust(width), "bold"), "\n".join([first, *(" " * width + x for x in more)])))
    console.print(Text(HINTS, style="dim"))


def show(names: Sequence[str], overrides: Sequence[str]) -> None:
    """Print the configuration as YAML that `load` takes, but for logins of addresses."""
    config = _read(names, overrides)
    console, notes = _console(), []
    if not gives_classes(config):
        notes.append(f"# {CLASSES}: {_value(config, CLASSES)}")
    for key in (entry.key for section in section_names() for entry in entries(section)):
        if without_logins(_raw(config, key)) != _raw(config, key):
            notes.append(f"# {key}: the login or query of its address is left out here")
    if notes:
        console.print(Text("\n".join(notes) + "\n", style="dim"))
    text = Text(re.sub(r"(?m)(?<=\n)(?=^\w+:)", "\n", dump(config, for_others=True)).rstrip("\n"))
    text.highlight_regex(r"(?m)^\w+:", "bold")
    text.highlight_regex(r"(?m)^  \w+(?=:)", "cyan")
    console.print(text)


def explain(name: str, names: Sequence[str], overrides: Sequence[str]) -> None:
    """Print what a setting, or each of a section, means, and its value where presets, files or overrides are named.

    Raises ValueError for a setting that does not exist, with the nearest one.
    """
    chosen = found(name)
    config = _read(names, overrides) if names or overrides else None
    console = _console()
    for number, entry in enumerate(chosen):
        if number:
            console.print()
        console.print(Text(entry.key, style="bold"))
        for line in textwrap.wrap(entry.meaning, console.width - 2):
            console.print(Text(f"  {line}"))
        for label, text in _facts(entry, config):
            console.print(Text.assemble((f"  {label:<9}", "dim"), text))


def differences(one: str, other: str) -> bool:
    """Print the settings that differ between two presets, files or run directories; whether there are any."""
    configs = [_read([name], ()) for name in (one, other)]
    rows = []
    for key in (entry.key for section in section_names() for entry in entries(section)):
        raw = [_raw(config, key) for config in configs]
        if not _is_same(*raw):
            left, right = ("not given" if _is_open(config, key) else _value(config, key) for config in configs)
            rows.append((key, left, right if left != right else f"{right} (with another login or query)"))
    console = _console()
    if not rows:
        console.print(Text(visible(f"{one} and {other} are equal: no setting differs")))
        return False
    rows.insert(0, ("setting", visible(brief(one)), visible(brief(other))))
    widths = [max((len(row[column]) for row in rows if len(row[column]) <= COLUMN), default=0) for column in (0, 1)]
    for number, (key, left, right) in enumerate(rows):
        line = f"{key:<{widths[0]}}  {left:<{widths[1]}}  {right}"
        console.print(Text(line, style="" if number else "bold"))
    return True


def _console() -> Terminal:
    return Terminal(soft_wrap=True, highlight=False)


def _read(names: Sequence[str], overrides: Sequence[str]) -> Config:
    """Nothing is done with it, so privileged settings in it need no check."""
    return load([_file(name) for name in names], overrides, acts=())


def _file(name: str) -> str | Path:
    """A run directory stands for its configuration. Raises FileNotFoundError for another folder."""
    if name in preset_names() or not name or not Path(name).is_dir():
        return name
    file = Path(name) / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{name}: not a run directory, it holds no config.yaml")
    return file


def _facts(entry: Entry, config: Config | None) -> list[tuple[str, str]]:
    facts = [("type", entry.kind), ("unit", entry.unit or ""), ("default", entry.default)]
    if config is not None:
        facts.append(("here", _value(config, entry.key)))
    return [(label, text) for label, text in facts if text]


def _is_open(config: Config, key: str) -> bool:
    """Whether the training set decides it."""
    return key == CLASSES and not gives_classes(config)


def _raw(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return None if _is_open(config, key) else getattr(getattr(config, section), name)


def _is_same(one: Any, other: Any) -> bool:
    """To Python, 1 is true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _value(config: Config, key: str) -> str:
    """As an override has it, without a login."""
    value = _raw(config, key)
    if _is_open(config, key):
        return f"as many as the training set has ({config.model.num_classes} without one)"
    return visible(in_one_line(without_logins(list(value) if isinstance(value, tuple) else value)))
