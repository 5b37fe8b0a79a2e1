"""Where the values of a configuration come from: presets and files laid on each other, each on its base."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.documents import MOST_BYTES, parse_yaml
from .mistakes import ConfigError, brief
from .overrides import model_at
from .ownership import ForeignSettingError
from .sections import Config

PRESETS = Path(__file__).resolve().parent / "presets"
MOST_BASES = 100
MOST_LINKS = 100
BASE = "base"  # the key, next to the sections, that names what a file is based on


@dataclass(frozen=True)
class Layer:
    """What one preset or file says itself. foreign: it came with weights or a run, and so is untrusted."""

    path: Path
    values: dict[str, Any]
    foreign: bool

    def __str__(self) -> str:
        return self.path.stem if self.path.parent == PRESETS else str(self.path)

    @property
    def keys(self) -> Iterator[str]:
        """The settings that it has, where it is sections of settings."""
        return (f"{section}.{key}" for section, settings in self.values.items() for key in settings)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """What a preset is and where it is from: the first sentence of its file."""
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return comment.partition(". ")[0].removesuffix(".")


def layers(preset_or_path: str | Path, *, of_run: bool = False, named_in: Path | None = None) -> list[Layer]:
    """A preset or file on what it is based on; the lowest first.

    of_run: the file is a run's, even where it does not look so. named_in: the file that names it, beside which a
    relative path is looked for. Raises ConfigError for what is not there or cannot be read, and for bases in a circle;
    ForeignSettingError for a base of a file that is not the user's.
    """
    found: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    name: Any = preset_or_path
    while True:
        path = _path(name, named_in)
        foreign = path.parent != PRESETS and (of_run or came_with_weights(path))
        values = _read(path, aliases=not foreign)
        has_base, name, named_in, of_run = BASE in values, values.pop(BASE, None), path, False
        layer = Layer(path, values, foreign)
        file = os.stat(path)
        if (file.st_dev, file.st_ino) in seen:
            chain = " -> ".join(map(str, [*reversed(found), layer]))
            raise ConfigError(f"the bases go round in a circle: {chain}; take `{BASE}` out of one of these files")
        found.insert(0, layer)
        seen.add((file.st_dev, file.st_ino))
        if not has_base:
            return found
        if len(found) > MOST_BASES:
            raise ConfigError(f"{preset_or_path}: more than {MOST_BASES} bases on each other")
        if foreign:
            raise ForeignSettingError(
                f"{path} came with weights or a run and is based on {brief(str(name))}, but a run's own file is whole. "
                "Copy it into a folder of your own if you want that (docs/operations.md, what is trusted)"
            )
        if not isinstance(name, str):
            raise ConfigError(f"{path}: {BASE}: expected the name of a preset or of a file, got {brief(repr(name))}")


def merged(found: Iterable[Layer]) -> dict[str, Any]:
    """The values of all, setting by setting those of the last layer that has one."""
    values: dict[str, Any] = {}
    for layer in found:
        for section, settings in layer.values.items():
            below = values.get(section, {})
            if isinstance(below, dict):  # otherwise it is a mistake, which is told
                values[section] = {**below, **settings} if isinstance(settings, dict) else settings
    return values


def sections(values: Any, source: str) -> dict[str, Any]:
    """Raises ConfigError for values that are no sections at all."""
    if not isinstance(values, dict):
        given = "nothing: it is empty" if values is None else type(values).__name__
        raise ConfigError(f"{source}: expected sections ({', '.join(Config.model_fields)}), got {given}")
    return values


def came_with_weights(file: Path) -> bool:
    """Whether a file, or what it is a link to, lies in a run directory or in one folder with a model.safetensors."""
    places = _places(file)
    if places[0].parent == Path("/proc/self/fd") and os.readlink(places[0]).startswith("/memfd:"):
        return False  # handed over by the program that started this one
    if any((place.parent / "model.safetensors").exists() for place in places):
        return True
    return any(
        any((folder / name).exists() for name in ("metrics.jsonl", "events.jsonl"))
        or any(folder.glob("checkpoints/step_*"))
        for folder in {folder for place in places for folder in place.parents}
    )


def _places(file: Path) -> list[Path]:
    """Where a file lies: as it is named, then behind each link on the way."""
    places = [Path(os.path.abspath(file))]
    while link := next((part for part in [*reversed(places[-1].parents), places[-1]] if part.is_symlink()), None):
        if len(places) > MOST_LINKS:  # which may lead round in a circle
            break
        behind = os.path.normpath(link.parent / os.readlink(link))  # none of its parents is a link
        places.append(Path(behind) / places[-1].relative_to(link))
    return places


def _path(preset_or_path: str | Path, named_in: Path | None) -> Path:
    if str(preset_or_path) in preset_names():
        return PRESETS / f"{preset_or_path}.yaml"
    path = (named_in.parent if named_in else Path()) / preset_or_path
    if os.path.isfile(path):  # unlike Path.is_file, it takes any text for a name
        return path
    name = brief(str(preset_or_path))
    wrong = f"no such preset or file{f' beside {named_in.name}' if named_in else ''}"
    if not name.strip():
        wrong = "an empty name of a preset or file"
    elif os.path.isdir(path):
        wrong = "a folder, where a preset or a YAML file is expected"
    elif os.path.exists(path):
        wrong = "a pipe or a device, and a configuration is read more than once: write it to a file"
    said = f"{named_in}: {BASE}: {name}: {wrong}" if named_in else f"{name}: {wrong}"
    near = difflib.get_close_matches(str(preset_or_path), preset_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    section, _, key = name.partition(".")
    if (model := model_at([section], Config)) and re.split(r"\W", key)[0] in model.model_fields:
        hint = " A setting is written section.key=value."
    raise ConfigError(f"{said}.{hint} Presets: {', '.join(preset_names())}")


def _read(path: Path, *, aliases: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = parse_yaml(file.read(MOST_BYTES + 1), aliases=aliases)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return sections(values, str(path))
