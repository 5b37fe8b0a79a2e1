"""Weights on disk: which file a path means, and safetensors files under our names, written and read.

A run directory holds checkpoints/step_00001234/, each with model.safetensors: the whole model in float32 under
our names, with configuration, categories, step and epochs in its metadata. Nothing here executes a pickle.
"""

import contextlib
import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...data.categories import Categories
from ..config import Config, dump
from ..mistakes import brief
from .manifest import damaged

WEIGHTS = "model.safetensors"
STEP = re.compile(r"step_(\d{8})")

Shapes = dict[str, tuple[int, ...]]
Found = TypeVar("Found")


def step_directory(run_directory: Path, step: int) -> Path:
    return run_directory / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One that lost a file later, or was copied in part, is among them."""
    return sorted(path for path in (run_directory / "checkpoints").glob("step_*") if STEP.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint of a run directory, or `path` itself when it is one.

    Raises FileNotFoundError that says what was looked for, and ValueError when the newest one has no weights.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint here; expected checkpoints/step_*/{WEIGHTS} or {WEIGHTS}")
    if not (found[-1] / WEIGHTS).is_file():
        if not os.path.lexists(found[-1]):  # its run has deleted it meanwhile
            return find_checkpoint(path)
        raise ValueError(damaged(found[-1], f"{WEIGHTS} is missing"))
    return found[-1]


def read_newest(path: str | Path, read: Callable[[Path], Found]) -> Found:
    """What `read` returns for the file of weights that `path` means: itself, or that of a run's newest checkpoint.

    A run may delete old checkpoints at any time: if the file is gone when it is read, the newest is looked for again.
    Raises FileNotFoundError when there is none, and what `read` raises about a file that is there.
    """
    while True:
        file = _weights_file(path)
        try:
            return read(file)
        except (OSError, ValueError):
            if file.exists():
                raise


def save_weights(
    path: Path, weights: Mapping[str, Tensor], config: Config, categories: Categories, step: int, epochs: int
) -> None:
    """Write weights as safetensors with configuration, categories, step and epochs in the metadata.

    Logins in the configuration's addresses are left out. epochs: how many are done.
    """
    metadata = {
        "format": "ddetr",
        "config": dump(config, for_others=True),
        "categories": json.dumps(categories.to_json()),
        "step": str(step),
        "epoch": str(epochs),  # the first release calls it so
    }
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata=metadata)


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.is_file() else find_checkpoint(path) / WEIGHTS


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read lazily; their shapes and the metadata come from the file's header.

    Raises ValueError for a file that cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._prefix = file, ""
        with _readable(file):
            self._opened = safe_open(file, framework="pt")
            self.metadata = self._opened.metadata() or {}
            names = self._opened.keys()
            self.shapes: Shapes = {name: tuple(self._opened.get_slice(name).get_shape()) for name in names}

    def under(self, prefix: str) -> "StoredTensors":
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        part = copy.copy(self)
        part._prefix += prefix
        part.shapes = {n.removeprefix(prefix): shape for n, shape in self.shapes.items() if n.startswith(prefix)}
        return part

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with _readable(self.file):
            return self._opened.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({brief(str(error))})") from error
