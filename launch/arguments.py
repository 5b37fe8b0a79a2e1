"""What the command line's arguments mean beyond what typer can express."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..data.addresses import RAY_ADDRESS

OVERRIDES = "section.key=value"
CONFIGURATION = f"PRESET_OR_FILE {OVERRIDES}"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=OVERRIDES,
        show_default=False,
        help="Settings to change: text as it is, other values in YAML: `train.name=7` `data.short_sides=[480,512]`.",
    ),
]

CHECKPOINTS = (
    "A run directory (its newest checkpoint), one `checkpoints/step_...` folder, a `model.safetensors`, or a `.pth` in "
    "the published layout"
)
CheckpointPath = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=f"{CHECKPOINTS}.")]
ON_RAY = "On a Ray cluster"
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Ray cluster to use: `HOST:PORT`, `ray://HOST:PORT` or `auto`. Without an address a local Ray starts.",
    ),
]


def normalised_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments as typer wants them: `--traceback` in front, and `--ray` always with a value.

    The value of `--ray` is optional, which typer cannot express. What follows it is taken as the address only when it
    looks like one (auto, local, HOST:PORT, ray://...); otherwise `local` is filled in.
    """
    result: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            result += arguments[position:]
            break
        if argument == "--traceback":
            result.insert(0, argument)
            continue
        result.append(argument)
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument == "--ray" and not (RAY_ADDRESS.fullmatch(following) or following.startswith("ray://")):
            result.append("local")
    return result


def is_override(argument: str) -> bool:
    """An override is `section.key=value`; an image file may hold an equals sign, but then it exists."""
    return re.match(r"[a-z_]+\.[a-z0-9_.]+=", argument) is not None and not Path(argument).exists()


def names_and_overrides(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Presets and files, and the settings behind them. A name with `=` needs a slash before that: `./a=b.yaml`.

    Raises ValueError for a name behind a setting.
    """
    arguments = list(arguments or ())
    is_setting = [re.match(r"[^/=]*=", argument) is not None for argument in arguments]
    count = is_setting.index(True) if True in is_setting else len(arguments)
    if False in is_setting[count:]:
        name = arguments[is_setting.index(False, count)]
        raise ValueError(f"{name}: presets and files stand before the settings, which are written {OVERRIDES}")
    return arguments[:count], arguments[count:]
