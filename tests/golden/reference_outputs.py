"""The reference outputs beside this file, read. README.md says what they are."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent


def load(name: str) -> dict[str, Any]:
    """`name`.json, with each tensor of `name`.safetensors in its place there.

    A tensor's name is the way to it from the outermost object, parts divided by "/"; in a list the part is a number.
    """
    values = json.loads((FOLDER / f"{name}.json").read_text())
    for path, tensor in load_file(FOLDER / f"{name}.safetensors").items():
        *parents, last = path.split("/")
        node = values
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = tensor
    return values
