"""Speed and memory of the operators against the eager specification in plain torch, in the same run.

    python benchmarks/deform_attn.py                   # CPU, one thread
    python benchmarks/deform_attn.py --threads 2
    python benchmarks/deform_attn.py --gpu

Prints one row a case, in the format of benchmarks/RESULTS.md. Operator and specification take turns, so that a busy
machine slows both; on the CPU with one thread the clock is the process's own CPU time.

Shapes: S positions of all levels, H = 8 heads, D channels of a head, Q queries (Q = S in the encoder), L = P = 4.
"""

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from ddetr.ops import deform_attn, fused_deform_attn, library, reference
from torch import Tensor

Shapes = list[tuple[int, int]]
LARGE: Shapes = [(100, 134), (50, 67), (25, 34), (13, 17)]  # an image of 800 x 1066
MEDIUM: Shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]  # 512 x 512
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
    Case("encoder 512x512", MEDIUM, None),
    Case("encoder 128x128, batch 4, D 16", SMALL, None, channels=16, batch=4),
    Case("decoder 300 queries, 800x1066", LARGE, 300),
    Case("decoder 300 queries, 512x512", MEDIUM, 300),
)


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


def milliseconds(function: Callable[[], object], device: str, threads: int) -> tuple[object, float]:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = function()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    result = function()
    return result, (clock() - begin) * 1e3


def measure(
    functions: dict[str, Callable[..., Tensor]], case: Case, made: list[Tensor], options: argparse.Namespace
) -> dict[str, tuple[list[float], list[float]]]:
    """Forward and backward times of every function, taken in turns; one round warms up."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
    for repeat in range(options.repeats + 1):
        for name, function in functions.items():
            output, forward = milliseconds(
                lambda function=function: function(made[0], case.shapes, *made[1:]), options.device, options.threads
            )
            assert isinstance(output, Tensor)
            gradient = torch.ones_like(output)
            _, backward = milliseconds(
                lambda output=output, gradient=gradient: output.backward(gradient), options.device, options.threads
            )
            if repeat > 0:
                times[name][0].append(forward)
                times[name][1].append(backward)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu", dest="device", action="store_const", const="cuda", help="the same as --device cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--paths", nargs="+", default=["avx512", "avx2"], help="instruction sets to time on the CPU")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many cases")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    best = library.cpu_capability()
    paths = ["cuda"] if options.device == "cuda" else [p for p in options.paths if library.cpu_capability(p) == p]
    library.cpu_capability("avx512")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, best path {best}"
    print(f"torch {torch.__version__}, {device}, {options.threads} thread(s), milliseconds as minimum (median)\n")
    print("| case | type | path | operator | forward | backward | both: times faster than the specification |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES[: options.cases]:
        for dtype in (torch.float32, torch.bfloat16):
            made = arguments(case, dtype, options.device)
            for path in paths:
                if path != "cuda":
                    library.cpu_capability(path)
                functions = {
                    "specification": reference.fused_deform_attn,
                    "fused": fused_deform_attn,
                    "plain": plain(deform_attn, case),
                }
                times = measure(functions, case, made, options)
                print_rows(case, dtype, path, times)
    if options.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"\nPeak resident memory of the whole run: {peak:.0f} MiB")


def print_rows(case: Case, dtype: torch.dtype, path: str, times: dict[str, tuple[list[float], list[float]]]) -> None:
    baseline = sum(min(part) for part in times["specification"])
    for name, (forward, backward) in times.items():
        cells = [f"{min(part):.2f} ({statistics.median(part):.2f})" for part in (forward, backward)]
        ratio = baseline / (min(forward) + min(backward))
        kind = str(dtype).removeprefix("torch.")
        print(f"| {case.name} | {kind} | {path} | {name} | {cells[0]} | {cells[1]} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
