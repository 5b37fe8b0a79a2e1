"""`ddetr doctor`: what is installed, whether the op works here, and how to fix what does not."""

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..ops import deform_attn, fused_deform_attn, library, reference
from .console import Terminal, paragraph

DRIVER = Path("/proc/driver/nvidia/version")
SPEED_SECONDS = 2.0  # of measuring, on each kind of device
SLOW = 4.0  # times faster than the reference; less than this is worth a word (8 to 40 are usual)
PARITY_TOLERANCE = 1e-4  # largest difference from the reference in float32, relative to the reference's largest value
_STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination. fix: what to do about it, if anything."""

    subject: str
    state: Literal["ok", "note", "broken"]  # a note needs no action unless the user misses what it names
    result: str
    fix: str = ""


def doctor() -> bool:
    """Print every finding, then the fixes. False when something essential is broken."""
    findings = [*packages(), *operators(), *driver(), *devices(), *parity(), *speed(), *deepspeed_cache()]
    table = Table("", "state", "finding", title="ddetr doctor", title_justify="left")
    for finding in findings:
        table.add_row(finding.subject, Text(finding.state, _STYLES[finding.state]), finding.result)
    console = Terminal(width=None if os.isatty(1) else 120)
    console.print(table)
    for finding in findings:
        if finding.fix:
            text = Text(paragraph(f"{finding.subject}: {finding.fix}"))
            text.stylize(_STYLES[finding.state], 0, len(finding.subject))
            console.print(text, soft_wrap=True)
    broken = sum(finding.state == "broken" for finding in findings)
    console.print(f"{broken} broken" if broken else "nothing essential is broken")
    return not broken


def packages() -> Iterator[Finding]:
    """The requirements in ddetr's own metadata against what is installed."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    for requirement in map(Requirement, importlib.metadata.requires("ddetr") or ()):
        if requirement.marker is not None:
            continue  # an optional extra
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "broken", "not installed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, "ok", version)
        else:
            needs = f"{version}, where {requirement.specifier} is needed"
            yield Finding(requirement.name, "broken", needs, f"pip install '{requirement}'")


def operators() -> Iterator[Finding]:
    """The two binaries of the op."""
    if "cpu" in library.UNAVAILABLE:
        yield Finding("op on CPU", "broken", "not usable", library.UNAVAILABLE["cpu"])
        return
    yield Finding("op on CPU", "ok", f"{library.cpu_capability()} instructions, {library.CPU_BINARY}")
    if "cuda" not in library.UNAVAILABLE:
        architectures = ", ".join(library.cuda_architectures())
        yield Finding("op on CUDA", "ok", f"built for {architectures}, {library.CUDA_BINARY}")
    elif torch.cuda.is_available():
        yield Finding("op on CUDA", "broken", "not usable, though there is a GPU", library.UNAVAILABLE["cuda"])
    else:
        yield Finding("op on CUDA", "note", "not built, and no GPU here needs it")


def driver() -> Iterator[Finding]:
    """The NVIDIA driver, and whether torch can use it."""
    cuda = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if not DRIVER.exists():
        yield Finding("NVIDIA driver", "note", f"none ({cuda}); training runs on the CPU")
        return
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())
    version = found[0] if found else "of unknown version"
    if torch.cuda.is_available():
        yield Finding("NVIDIA driver", "ok", f"{version}, {cuda}")
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        fix = "install a torch that is built for CUDA: https://pytorch.org/get-started/locally"
    elif hidden is not None:
        fix = f"CUDA_VISIBLE_DEVICES={hidden!r} may hide the GPUs: unset it"
    else:
        fix = (
            f"a driver that is older than CUDA {torch.version.cuda} needs an update, or another torch build; a "
            "container must be given the GPUs (docker run --gpus all); nvidia-smi must list them"
        )
    yield Finding("NVIDIA driver", "broken", f"{version}, but torch sees no GPU ({cuda})", fix)


def devices() -> Iterator[Finding]:
    """Each GPU against the architectures in the CUDA binary."""
    if not torch.cuda.is_available():
        return
    architectures = library.cuda_architectures()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        name = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability[0]}.{capability[1]}"
        )
        if "cuda" in library.UNAVAILABLE or runs_on(architectures, capability):
            yield Finding(f"GPU {index}", "ok", name)
        else:
            yield Finding(
                f"GPU {index}",
                "broken",
                f"{name}; the op is built for {', '.join(architectures)}",
                f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} {library.BUILD_COMMAND}",
            )


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` runs on a GPU: machine code within one major version, PTX on any later one."""
    for architecture in architectures:
        major, minor = map(int, architecture.removesuffix("+PTX").rstrip("af").split("."))
        if architecture.endswith("+PTX") and (major, minor) <= capability:
            return True
        if major == capability[0] and minor <= capability[1]:
            return True
    return False


def _kinds_with_op() -> list[str]:
    """The kinds of devices here ("cpu", "cuda") that have the op."""
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [kind for kind in here if kind not in library.UNAVAILABLE]


def parity() -> Iterator[Finding]:
    """The op against the reference, forward and backward, on every kind of device that has it."""
    for kind in _kinds_with_op():
        try:
            difference = largest_difference(torch.device(kind))
        except RuntimeError as error:  # a launch that fails is a finding, not the end of the examination
            yield Finding(f"self-test on {kind}", "broken", str(error).split("\n")[0], library.BUILD_COMMAND)
            continue
        result = f"largest relative difference from the reference {difference:.1e}"
        if difference <= PARITY_TOLERANCE:
            yield Finding(f"self-test on {kind}", "ok", result)
        else:
            yield Finding(f"self-test on {kind}", "broken", f"{result}, at most {PARITY_TOLERANCE:.0e} is right")


def largest_difference(device: torch.device) -> float:
    """The largest difference from the reference, relative to each tensor's largest value.

    Compares outputs and gradients of both functions in float32.
    """
    shapes = [(12, 16), (6, 8), (3, 4), (2, 2)]
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        values = torch.empty(size).uniform_(low, high, generator=generator)
        return values.to(device).requires_grad_()

    batch, heads, queries, levels, points, channels = 2, 8, 20, 4, 4, 32
    value = leaf(batch, sum(h * w for h, w in shapes), heads, channels)
    locations = leaf(batch, queries, heads, levels, points, 2, low=-0.2, high=1.2)
    weights = leaf(batch, queries, heads, levels, points, low=0.0)
    references = leaf(batch, queries, levels, 4, low=0.1, high=0.9)
    offsets = leaf(batch, queries, heads, levels, points, 2, low=-4.0, high=4.0)
    logits = leaf(batch, queries, heads, levels * points)
    cases = [
        (deform_attn, reference.deform_attn, (value, shapes, locations, weights)),
        (fused_deform_attn, reference.fused_deform_attn, (value, shapes, references, offsets, logits)),
    ]
    largest = 0.0
    for function, specification, arguments in cases:
        leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
        results = []
        for compute in (function, specification):
            output = compute(*arguments)
            cotangent = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, cotangent)])
        for ours, theirs in zip(*results, strict=True):
            largest = max(largest, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return largest


def speed() -> Iterator[Finding]:
    """The op against the reference, forward and backward, at the size of an encoder layer for 512 x 512 pixels."""
    for kind in _kinds_with_op():
        try:
            ours, theirs = (
                least_seconds(function, kind) for function in (fused_deform_attn, reference.fused_deform_attn)
            )
        except RuntimeError as error:
            yield Finding(f"speed on {kind}", "broken", str(error).split("\n")[0], library.BUILD_COMMAND)
            continue
        where = f"{torch.get_num_threads()} threads, {library.cpu_capability()}" if kind == "cpu" else "float32"
        result = f"{ours * 1e3:.1f} ms a layer ({where}), {theirs / ours:.1f} times faster than the reference"
        if theirs >= SLOW * ours:
            yield Finding(f"speed on {kind}", "ok", result)
        else:
            fix = "run it again when nothing else keeps the device busy; 8 times and more are usual"
            yield Finding(f"speed on {kind}", "note", result, fix)


def least_seconds(function: Callable[..., Tensor], kind: str) -> float:
    """Seconds of the fastest of a few forward and backward passes."""
    shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]
    positions, heads, points, channels = sum(h * w for h, w in shapes), 8, 4, 32
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.rand(size, generator=generator).to(kind).requires_grad_()

    value, references = leaf(1, positions, heads, channels), leaf(1, positions, len(shapes), 2)
    offsets = leaf(1, positions, heads, len(shapes), points, 2)
    logits = leaf(1, positions, heads, len(shapes) * points)
    least, end = float("inf"), time.perf_counter() + SPEED_SECONDS / 2
    while time.perf_counter() < end or least == float("inf"):
        begin = time.perf_counter()
        function(value, shapes, references, offsets, logits).sum().backward()
        if kind == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - begin)
    return least


def deepspeed_cache() -> Iterator[Finding]:
    """Ops that train.deepspeed_extra made DeepSpeed compile: built, or stuck behind a lock of a killed build."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")  # as torch.utils.cpp_extension has it
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    for folder in sorted({path.parent for name in ("lock", "build.ninja") for path in root.glob(f"**/{name}")}):
        lock = folder / "lock"
        if lock.exists():
            minutes = (time.time() - lock.stat().st_mtime) / 60
            result = f"locked for {minutes:.0f} minutes: being compiled, or its build was killed"
            yield Finding(folder.name, "note", result, f"if nothing is compiling: rm {lock}")
        elif list(folder.glob("*.so")):
            yield Finding(folder.name, "ok", f"compiled, {folder}")
        else:
            yield Finding(folder.name, "note", "not compiled to the end; the next run goes on", "")
