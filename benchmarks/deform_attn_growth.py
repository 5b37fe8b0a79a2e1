"""How the operator's cost grows: with the number of queries, and with the size of the feature maps.

    python benchmarks/deform_attn_growth.py [--gpu] [--out build/op_growth.png]

Prints the times and draws them beside the specification's, which take turns. Attention over all positions would grow
with queries times positions; sampling grows with queries alone, but for what writing a gradient of value costs: it is
as large as the maps however few queries read them.

Shapes: H = 8 heads, D = 32 channels of a head, L = P = 4; float32, one thread.
"""

import argparse
import platform
from pathlib import Path

import matplotlib as mpl
import torch
from deform_attn import Case, arguments, measure

mpl.use("Agg")
from matplotlib import pyplot

QUERIES = (100, 300, 1000, 3000, 10_000, 30_000)
SIDES = (16, 32, 64, 128, 256)  # of the finest level, in pixels
PARTS = ("forward", "backward")


def levels(side: int) -> list[tuple[int, int]]:
    return [(side >> level, side >> level) for level in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--gpu", dest="device", action="store_const", const="cuda", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/op_growth.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    sweeps = {
        "queries, on maps of 64, 32, 16 and 8 pixels a side": [
            (count, Case(f"{count} queries", levels(64), count)) for count in QUERIES
        ],
        "pixels of all maps, 300 queries": [
            (sum(h * w for h, w in levels(side)), Case(f"finest map {side} x {side}, 300 queries", levels(side), 300))
            for side in SIDES
        ],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, one thread"
    print(f"torch {torch.__version__}, {device}; least of {options.repeats}, milliseconds")
    print("\n| case | operator | forward | backward |\n| --- | --- | --- | --- |")
    for axis, (label, cases) in zip(axes, sweeps.items(), strict=True):
        least: dict[str, tuple[list[float], list[float]]] = {"fused": ([], []), "specification": ([], [])}
        for _, case in cases:
            made = arguments(case, torch.float32, options.device)
            times = measure(case, made, 1, options, tuple(least))
            for name, parts in times.items():
                for part, line in zip(parts, least[name], strict=True):
                    line.append(min(part))
                print(f"| {case.name} | {name} | {min(parts[0]):.2f} | {min(parts[1]):.2f} |", flush=True)
        sizes = [size for size, _ in cases]
        for name, colour in (("specification", "tab:gray"), ("fused", "tab:blue")):
            for part, line, style in zip(PARTS, least[name], ("-", "--"), strict=True):
                axis.plot(sizes, line, style, marker="o", markersize=4, color=colour, label=f"{name}, {part}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds")
        axis.grid(which="both", alpha=0.2)
    axes[0].legend()
    figure.suptitle(f"Cost of fused_deform_attn beside its specification ({device}, float32)", fontsize=11)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
