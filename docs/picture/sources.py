"""What the picture says about code and paper, looked up in the code: a rename breaks the drawing, not the picture."""

import inspect
import re
from pathlib import Path
from typing import Any

from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]


def place(*objects: Any) -> str:
    """`core/model/detector.py: DeformableDetr._tokens` of functions or classes in one file."""
    files = {Path(inspect.getsourcefile(inspect.unwrap(item)) or "").resolve() for item in objects}
    (file,) = files
    return f"{file.relative_to(REPOSITORY)}: {', '.join(item.__qualname__ for item in objects)}"


def quote(item: Any, text: str) -> str:
    """`text`, which must stand in the source of the function or class, whatever its line breaks."""
    if _without_spaces(text) not in _without_spaces(inspect.getsource(inspect.unwrap(item))):
        raise LookupError(f"{item.__qualname__} does not say {text!r} any more: change the picture")
    return text


def cite(item: Any, *where: str) -> str:
    """`§4.1, eq. 3` of "section 4.1" and "equation 3", which the docstring of the object or its module must name."""
    said = f"{inspect.getdoc(item)}\n{inspect.getdoc(inspect.getmodule(item))}"
    said = re.sub(r"\s+", " ", said)
    for reference in where:
        word, _, number = reference.rpartition(" ")
        if not re.search(rf"{word}[^.]*?{re.escape(number)}(?![\d])|and {re.escape(number)}(?![\d])", said):
            raise LookupError(f"{item.__qualname__} does not cite {reference!r}: {said[:300]}")
    short = {"section ": "§", "appendix ": "§", "equation": "eq."}
    return ", ".join(re.sub("|".join(short), lambda match: short[match[0]], reference) for reference in where)


def size_of(module: nn.Module) -> str:
    """Of a linear layer `256 → 1024`, an embedding `(4, 256)`, a convolution of stride 2 `3 x 3 / 2, 512 → 256`."""
    if isinstance(module, nn.Linear):
        return f"{module.in_features} → {module.out_features}"
    if isinstance(module, nn.Embedding):
        return f"{tuple(module.weight.shape)}"
    assert isinstance(module, nn.Conv2d), module
    height, width = module.kernel_size
    stride = f" / {module.stride[0]}" if module.stride[0] > 1 else ""
    return f"{height} x {width}{stride}, {module.in_channels} → {module.out_channels}"


def _without_spaces(text: str) -> str:
    return re.sub(r"[\s]|,(?=\s*[)\]])", "", text)
