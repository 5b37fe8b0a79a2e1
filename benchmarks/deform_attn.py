"""Speed and memory of the operators against the eager specification in plain torch, in the same run.

    python benchmarks/deform_attn.py                   # CPU, one thread and two
    python benchmarks/deform_attn.py --gpu

Prints tables in the format of benchmarks/RESULTS.md. Operator and specification take turns, so that a busy machine
slows both; on the CPU with one thread the clock is the process's own CPU time.

Shapes: S positions of all levels, H = 8 heads, D channels of a head, Q queries (Q = S in the encoder), L = P = 4.
"""

import argparse
import functools
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ddetr.ops import deform_attn, fused_deform_attn, library, reference
from torch import Tensor

Shapes = list[tuple[int, int]]
LARGE: Shapes = [(100, 134), (50, 67), (25, 34), (13, 17)]  # an image of 800 x 1066
MEDIUM: Shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]  # 512 x 512
WIDE: Shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]  # 800 x 1333
SMALL: Shapes = [(16, 16), (8, 8), (4, 4), (2, 2)]  # 128 x 128


@dataclass(frozen=True)
class Case:
    name: str
    shapes: Shapes
    queries: int | None  # None: one for every position, at its pixel's centre
    channels: int = 32
    batch: int = 1


CASES = (
    Case("encoder 800x1066", LARGE, None),
    Case("encoder 800x1066, batch 2", LARGE, None, batch=2),
    Case("encoder 512x512", MEDIUM, None),
    Case("encoder 128x128, batch 4, D 16", SMALL, None, channels=16, batch=4),
    Case("decoder 300 queries, 800x1066", LARGE, 300),
    Case("decoder 300 queries, 512x512", MEDIUM, 300),
)
# Goals on an H100 are set at this size, in bfloat16.
GPU_CASES = (Case("encoder 800x1333", WIDE, None), Case("encoder 800x1333, batch 8", WIDE, None, batch=8), *CASES)
GPU_CALLS = 10  # in a row, timed together


def arguments(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """value, reference_points, sampling_offsets, attention_logits; offsets spread over about two pixels."""
    torch.manual_seed(0)
    positions, levels, heads, points = sum(h * w for h, w in case.shapes), len(case.shapes), 8, 4
    if case.queries is None:
        centres = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1)
            for h, w in case.shapes
        ]
        references = torch.cat(centres)[None, :, None].expand(case.batch, -1, levels, -1)
    else:
        references = torch.rand(case.batch, case.queries, 1, 2).expand(-1, -1, levels, -1)
    queries = references.shape[1]
    made = [
        torch.randn(case.batch, positions, heads, case.channels),
        references.contiguous(),
        torch.randn(case.batch, queries, heads, levels, points, 2) * 2,
        torch.randn(case.batch, queries, heads, levels * points),
    ]
    made = [tensor.to(device, dtype) for tensor in made]
    for tensor in (made[0], made[2], made[3]):
        tensor.requires_grad_()
    return made


def plain(operator: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    """The plain operator behind torch's softmax and location arithmetic, as models that have no fused one call it."""

    def run(value: Tensor, shapes: Shapes, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype, device=offsets.device)
        locations = references[:, :, None, :, None] + offsets / sizes[:, None]
        return operator(value, shapes, locations, logits.softmax(-1).view(offsets.shape[:-1]))

    return run


FUNCTIONS: dict[str, Callable[[Case], Callable[..., Tensor]]] = {
    "specification": lambda case: reference.fused_deform_attn,
    "fused": lambda case: fused_deform_attn,
    "plain": lambda case: plain(deform_attn, case),
}


def milliseconds(function: Callable[[], object], device: str, threads: int) -> float:
    """Of one call. On a GPU of many in a row, so that the device does not wait for Python between them."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(GPU_CALLS):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / GPU_CALLS
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    function()
    return (clock() - begin) * 1e3


def measure(
    case: Case,
    made: list[Tensor],
    threads: int,
    options: argparse.Namespace,
    names: tuple[str, ...] = tuple(FUNCTIONS),
) -> dict[str, tuple[list[float], list[float]]]:
    """Forward and backward times of every function, taken in turns; one round warms up."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    leaves = [tensor for tensor in made if tensor.requires_grad]
    for repeat in range(options.repeats + 1):
        for name in names:
            forward = functools.partial(FUNCTIONS[name](case), made[0], case.shapes, *made[1:])
            forward_time = milliseconds(forward, options.device, threads)
            output = forward()
            gradient = torch.ones_like(output)
            backward = functools.partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True)
            backward_time = milliseconds(backward, options.device, threads)
            if repeat > 0:
                times[name][0].append(forward_time)
                times[name][1].append(backward_time)
    return times


def extra_bytes(name: str, case: Case, device: str) -> tuple[int, int]:
    """Peak of the memory that one forward and backward takes beyond its arguments; and what of it are results.

    On the CPU in a process of its own: what an earlier call freed is still the process's, and would not count.
    """
    if device == "cpu":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_extra_bytes, (name, case, device))
    return _extra_bytes(name, case, device)


def _extra_bytes(name: str, case: Case, device: str) -> tuple[int, int]:
    torch.set_num_threads(1)
    peak = results = 0
    for size in (Case("first call", SMALL, None), case):
        made = arguments(size, torch.float32, device)
        gradient = torch.ones(*made[2].shape[:2], made[0].shape[2] * made[0].shape[3], device=device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
            before = _resident("VmRSS")
        output = FUNCTIONS[name](size)(made[0], size.shapes, *made[1:])
        output.backward(gradient)
        peak = (torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")) - before
        kept = [output, *(tensor.grad for tensor in made if tensor.grad is not None)]
        results = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return peak, results


def _resident(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu", dest="device", action="store_const", const="cuda", help="the same as --device cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--paths", nargs="+", default=["avx512", "avx2"], help="instruction sets to time on the CPU")
    parser.add_argument("--cases", type=int, default=len(GPU_CASES), help="only the first so many cases")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    best = library.cpu_capability()
    paths = ["cuda"] if options.device == "cuda" else [p for p in options.paths if library.cpu_capability(p) == p]
    library.cpu_capability("avx512")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, best path {best}"
    print(f"torch {torch.__version__}, {device}; milliseconds as minimum (median) of {options.repeats}")
    cases = (GPU_CASES if options.device == "cuda" else CASES)[: options.cases]
    for threads in options.threads if options.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        print(f"\n### {threads} thread{'s' * (threads > 1)}\n" if options.device == "cpu" else "")
        print("| case | type | path | operator | forward | backward | times faster: forward | backward | both |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16):
                made = arguments(case, dtype, options.device)
                for path in paths:
                    if path != "cuda":
                        library.cpu_capability(path)
                    print_rows(case, dtype, path, measure(case, made, threads, options))
        library.cpu_capability("avx512")
    print("\n| float32, forward and backward | operator | extra memory | share | without the results | share |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases:
        extra = {name: extra_bytes(name, case, options.device) for name in FUNCTIONS}
        most, results = extra["specification"]
        for name, (peak, kept) in extra.items():
            cells = [f"{peak / 2**20:.1f} MiB", f"1/{most / peak:.1f}", f"{(peak - kept) / 2**20:.1f} MiB"]
            cells.append(f"1/{(most - results) / (peak - kept):.0f}" if peak - kept > 2**20 else "under 1 MiB")
            print(f"| {case.name} | {name} | {' | '.join(cells)} |", flush=True)


def print_rows(case: Case, dtype: torch.dtype, path: str, times: dict[str, tuple[list[float], list[float]]]) -> None:
    baseline = [min(part) for part in times["specification"]]
    for name, parts in times.items():
        cells = [f"{min(part):.2f} ({statistics.median(part):.2f})" for part in parts]
        least = [min(part) for part in parts]
        cells += [f"{theirs / ours:.1f}" for theirs, ours in zip(baseline, least, strict=True)]
        kind = str(dtype).removeprefix("torch.")
        row = [case.name, kind, path, name, *cells, f"{sum(baseline) / sum(least):.1f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
