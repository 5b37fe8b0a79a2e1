"""What a checkpoint says of itself: configuration, categories, position and shapes, whatever program wrote it."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ...data.categories import Categories
from ...data.documents import parse_json
from ...data.values import member, whole
from ..config import Config, ConfigError, changed, parse, without_logins
from ..mistakes import brief
from .published import Published, from_published, is_published, published_config, read_published, unwrapped
from .weights import Shapes, StoredTensors, read_newest, shapes_of

log = logging.getLogger("ddetr")
Described = TypeVar("Described")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says of itself. shapes: of its tensors, under our names.

    weights: those tensors; from a file of ours they are read lazily.
    """

    file: Path
    config: Config
    categories: Categories | None
    step: int | None
    epochs: int | None  # that were done
    shapes: Shapes
    weights: Mapping[str, Tensor]


def contents(path: str | Path, overrides: Sequence[str] = ()) -> Contents:
    """Read a checkpoint's description, with overrides applied to its configuration; nothing is built or acted on.

    For a published checkpoint the configuration is read off the tensors' shapes. Raises FileNotFoundError without a
    checkpoint, ValueError for a file that is none, and ConfigError for mistakes in configuration or overrides. An
    override that changes the model is one of them: the weights fix the model.
    """
    return read_newest(path, lambda file: contents_of(file, overrides))


def contents_of(file: Path, overrides: Sequence[str]) -> Contents:
    """`contents` of exactly this file of weights."""
    opened = StoredTensors(file) if file.suffix == ".safetensors" else None
    if opened is None or opened.metadata.get("format") != "ddetr":
        published = read_published(file) if opened is None else Published(dict(opened), {}, None)
        named = unwrapped(published.weights)
        if opened is not None and not is_published(named):
            raise ValueError(f"{file}: was not written by ddetr; its metadata names no configuration")
        if published.taken:
            log.warning("%s", published.taken)
        model_config = published_config(named, published.arguments, file)
        stored, categories, step, epochs = Config(model=model_config), None, None, None
        weights: Mapping[str, Tensor] = from_published(named)
        shapes = shapes_of(weights)
    else:
        settings = [override for override in overrides if not override.strip().startswith("model.")]
        weights, shapes, metadata = opened, opened.shapes, opened.metadata
        stored, categories, step, epochs = described_by(
            file,
            lambda: (
                _with_logins(parse(member(metadata, "config", str), str(file), settings), file),
                Categories.from_json(parse_json(member(metadata, "categories", str))),
                whole({"step": int(member(metadata, "step", str))}, "step"),
                whole({"epoch": int(member(metadata, "epoch", str))}, "epoch"),
            ),
        )
    config = changed(stored, overrides, str(file))
    fixed = [f"model.{name}" for name, value in stored.model if getattr(config.model, name) != value]
    if fixed:
        raise ConfigError(f"{', '.join(fixed)}: the weights in {file} fix the model; leave the override out")
    return Contents(file, config, categories, step, epochs, shapes, weights)


def _with_logins(stored: Config, file: Path) -> Config:
    """`stored` with the logins of addresses from the run's own config.yaml: weights, which are shared, hold none."""
    own = file.parent.parent.parent / "config.yaml"
    if file.parent.parent.name != "checkpoints" or not own.is_file():
        return stored
    with contextlib.suppress(ValueError, OSError):  # weights can be used without
        data = parse(own.read_text(), str(own)).data
        same = {
            key: getattr(data, key)
            for key in ("train", "validation")
            if getattr(data, key) and without_logins(getattr(data, key)) == getattr(stored.data, key)
        }
        return stored.model_copy(update={"data": stored.data.model_copy(update=same)})
    return stored


def described_by(file: Path, read: Callable[[], Described]) -> Described:
    """What `read` finds in a file's metadata. Raises ValueError that names the file when it cannot be used."""
    try:
        return read()
    except ConfigError:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: its metadata cannot be used: {brief(str(error))}") from error
