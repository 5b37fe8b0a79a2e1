"""What ranks say to each other in a step of each ZeRO stage, what it costs, and what follows for many GPUs.

One and two real ranks on this machine take real steps of the r50 preset on random images, one thread each. Every
collective operation is counted with its bytes; the time of a step of two ranks is predicted from that of one, beside
another that it does not talk to, and from all-reduces timed alone, and then measured. The same arithmetic follows for
GPUs, from assumptions that are named (alone with --gpus). docs/scaling.md explains it.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

STAGES = (0, 1, 2, 3)
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather")
PROBE_ELEMENTS = (1_000, 100_000, 1_000_000, 10_000_000)
SIZES = ((4, "the tiny preset"), (40, "r50"), (210, "Swin-L"), (1000, "a ViT of a billion"))

# For the predictions on GPUs: assumptions, not measurements.
# Of one GPU, forward and backward of r50 at COCO's sizes: the most that a published training time comes to (an A100 in
# fp32), and a guess at a newer one in bf16.
IMAGES_A_SECOND = (7.3, 25.0)
IMAGES_A_GPU = 2
GPUS_A_NODE = 8
NODE_BYTES_A_SECOND = 200e9  # of an all-reduce within a node (NVLink)
NETWORK_BYTES_A_SECOND = 40e9  # of a node, in and out (400 Gbit/s at 80 %)
NODE_LATENCY_SECONDS = 3e-6  # of a hop within a node
NETWORK_LATENCY_SECONDS = 10e-6  # and of one between nodes
STAGE_3_CALLS = 246  # measured on two ranks, for r50
HIDDEN = 0.5  # share of the exchange that goes on beside the backward pass
JITTER = 0.02  # standard deviation of a rank's step, as a share of it; all wait for the slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the images, pixels")
    parser.add_argument("--images", type=int, default=1, help="of each rank and step")
    parser.add_argument("--steps", type=int, default=6, help="timed, after two that are not")
    parser.add_argument("--gpus", action="store_true", help="only print the predictions for GPUs")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        worker(arguments)
        return
    if not arguments.gpus:
        measured(arguments)
    for rate in IMAGES_A_SECOND:
        predictions(rate, parameters=40.1e6)
    memory()


def measured(arguments: argparse.Namespace) -> None:
    print(
        f"r50, fp32, {arguments.images} image(s) of {arguments.size} x {arguments.size} a rank, one thread each, gloo"
    )
    with ThreadPoolExecutor() as pool:
        alone, _ = pool.map(lambda _: run(1, 0, "fp32", arguments), range(2))
    print(f"one rank, beside another one: {seconds(alone['steps'])} s a step")
    print("| stage | calls a step | MB a step | of the gradients | step, s: min (median) | predicted, s | efficiency | "
          "predicted |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    pairs = {("fp32", stage): run(2, stage, "fp32", arguments) for stage in STAGES}
    for (_, stage), pair in pairs.items():
        moved = sum(size for _, size in pair["calls"].values())
        calls = sum(number for number, _ in pair["calls"].values())
        latency, rate = pair["latency"], pair["rate"]
        expected = min(alone["steps"]) + calls * latency + moved / rate
        found = min(pair["steps"])
        print(
            f"| {stage} | {calls} | {moved / 1e6:.0f} | {moved / (4 * pair['parameters']):.2f} | "
            f"{seconds(pair['steps'])} | {expected:.2f} | "
            f"{min(alone['steps']) / found:.2f} | {min(alone['steps']) / expected:.2f} |"
        )
    print(f"all-reduce between the two: {1e3 * latency:.2f} ms and {rate / 1e9:.2f} GB/s")
    for (_, stage), pair in pairs.items():
        calls = [f"{number} {name} of {size / 1e6:.1f} MB" for name, (number, size) in sorted(pair["calls"].items())]
        print(f"stage {stage}: {', '.join(calls)}")

    print("\nmemory of a rank, MiB: what it holds between two steps more than before it made the model, and its peak")
    print("| precision | stage | weights and AdamW's state | held | peak |")
    print("| --- | --- | --- | --- | --- |")
    pairs |= {("bf16", stage): run(2, stage, "bf16", arguments) for stage in STAGES}
    for (precision, stage), pair in pairs.items():
        state, _ = bytes_a_parameter(precision, stage, 2)
        kept = pair["parameters"] * state / 2**20
        held, peak = (max(pair[name]) / 2**20 for name in ("held", "peak"))
        print(f"| {precision} | {stage} | {kept:.0f} | {held:.0f} | {peak:.0f} |")


def seconds(times: list[float]) -> str:
    return f"{min(times):.2f} ({statistics.median(times):.2f})"


def bytes_a_parameter(precision: str, stage: int, ranks: int) -> tuple[float, float]:
    """Of a rank: weights with AdamW's state, and gradients."""
    width = 4 if precision == "fp32" else 2
    master = 8 if precision == "fp32" else 12  # AdamW's moments, and the float32 weights where there are others
    return (
        width / (ranks if stage == 3 else 1) + master / (ranks if stage > 0 else 1),
        width / (ranks if stage > 1 else 1),
    )


def run(ranks: int, stage: int, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 of so many measured."""
    print(f"measuring {precision}, stage {stage} on {ranks} rank(s)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-c", "import sys; from ddetr.launch.torchrun import launch; launch(sys.argv[1:])"]
        command += ["--standalone", f"--nproc-per-node={ranks}", __file__]
        command += [f"--stage={stage}", f"--size={arguments.size}", f"--images={arguments.images}"]
        command += [f"--steps={arguments.steps}", f"--precision={precision}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DDETR_RESULT": str(output)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
        return json.loads(output.read_text())


def worker(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from ddetr.core.config import load
    from ddetr.core.model.detector import build
    from ddetr.core.training.engine import Engine
    from ddetr.core.training.trainer import train_step
    from ddetr.core.training.world import join
    from ddetr.data.batch import Sample, collate

    settings = [f"train.zero_stage={arguments.stage}", f"train.precision={arguments.precision}"]
    settings += ["train.device=cpu", "train.threads=1"]
    settings += [f"train.batch_size={arguments.images * int(os.environ['WORLD_SIZE'])}"]
    config = load("r50", [*settings, "model.pretrained_backbone=false", "optim.clip_norm=0.1"])
    calls: dict[str, list[int]] = {}
    count_into(calls)
    world = join(config.train)
    torch.manual_seed(0)
    before = held_bytes()
    model = build(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    engine = Engine(model.train(), config, world)
    size = arguments.size
    box = torch.tensor([[0.4, 0.4, 0.4, 0.4]])
    sample = Sample(
        image=torch.randint(0, 255, (3, size, size), dtype=torch.uint8),
        boxes_cxcywh=box,
        labels=torch.tensor([1]),
        image_id=world.rank,
        original_size=(size, size),
    )
    batch = collate([sample] * arguments.images).batch()
    times = []
    for number in range(1, arguments.steps + 3):
        dist.barrier()
        began = time.perf_counter()
        train_step(engine, [batch], number, config, world, stop=False)
        dist.barrier()
        times.append(time.perf_counter() - began)
    calls.clear()
    train_step(engine, [batch], arguments.steps + 3, config, world, stop=False)
    result: dict[str, Any] = {"steps": times[2:], "calls": dict(calls), "parameters": parameters}
    latency, rate = probe() if world.size > 1 else (0.0, 1.0)
    held = world.gather([held_bytes() - before], int)
    peak = world.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024], int)
    if world.rank == 0:
        result |= {"held": held, "peak": peak, "latency": latency, "rate": rate}
        Path(os.environ["DDETR_RESULT"]).write_text(json.dumps(result))
    dist.destroy_process_group()


def held_bytes() -> int:
    """Of this process, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def count_into(calls: dict[str, list[int]]) -> None:
    """From now on, add up number and bytes of each kind of collective operation; the bytes of the whole tensor."""
    import torch.distributed as dist
    from torch import Tensor

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
            number, size = calls.get(name, [0, 0])
            calls[name] = [number + 1, size + max((tensor.nbytes for tensor in tensors), default=0)]
            return original(*arguments, **named)

        return call

    for name in COLLECTIVES:  # before DeepSpeed remembers some of them
        setattr(dist, name, counting(name, getattr(dist, name)))


def probe() -> tuple[float, float]:
    """Seconds of an all-reduce of nothing, and bytes a second of a large one."""
    import torch
    import torch.distributed as dist

    times = []
    for elements in PROBE_ELEMENTS:
        tensor = torch.zeros(elements)
        rounds = []
        for _ in range(6):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            rounds.append(time.perf_counter() - began)
        times.append(min(rounds))
    return times[0], 4 * PROBE_ELEMENTS[-1] / (times[-1] - times[0])


def predictions(rate: float, parameters: float) -> None:
    """Weak scaling on GPUs: each takes as many images, however many there are. rate: images a second of one GPU."""
    compute = IMAGES_A_GPU / rate
    print(
        f"\nassumed: {rate:g} images/s of each GPU, so {compute:.3f} s for the {IMAGES_A_GPU} of a step; gradients and "
        f"weights in bf16, jitter {JITTER:.0%}"
    )
    print("| GPUs | exchange of stage 0, ms | of 1 and 2 | of 3 | slowest rank, ms | efficiency of stage 0 | "
          "of 1 and 2 | of 3 | images/s, stage 1 |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        reduce, gather = (moved_seconds(2 * parameters, gpus, calls) for calls in (1, STAGE_3_CALLS))
        exchanges = (2 * reduce, 3 * reduce, 2 * gather)  # an all-reduce is a reduce-scatter and an all-gather
        # The largest of n normal numbers lies about sqrt(2 ln n) standard deviations above the mean.
        slowest = JITTER * compute * math.sqrt(2 * math.log(gpus))
        steps = [compute + slowest + (1 - HIDDEN) * exchange for exchange in exchanges]
        efficiencies = " | ".join(f"{compute / step:.2f}" for step in steps)
        print(
            f"| {gpus} | {' | '.join(f'{1e3 * exchange:.1f}' for exchange in exchanges)} | {1e3 * slowest:.1f} | "
            f"{efficiencies} | {gpus * IMAGES_A_GPU / steps[1]:.0f} |"
        )


def memory() -> None:
    print("\nGB of weights, gradients and AdamW's state on each rank in bf16, stages 0 / 1 / 2 / 3")
    print("| parameters | such as | on 8 ranks | on 64 ranks |")
    print("| --- | --- | --- | --- |")
    for millions, example in SIZES:
        cells = []
        for ranks in (8, 64):
            each = [1e-3 * millions * sum(bytes_a_parameter("bf16", stage, ranks)) for stage in STAGES]
            cells.append(" / ".join(f"{size:.2f}" for size in each))
        print(f"| {millions} million | {example} | {' | '.join(cells)} |")


def moved_seconds(size: float, gpus: int, calls: int) -> float:
    """All-gather or reduce-scatter in two levels, in so many calls: in the nodes, and among them with a share each."""
    nodes = gpus / GPUS_A_NODE
    within = (GPUS_A_NODE - 1) / GPUS_A_NODE * size / NODE_BYTES_A_SECOND
    among = (nodes - 1) / nodes * size / NETWORK_BYTES_A_SECOND
    # A ring within, a tree among.
    latency = (GPUS_A_NODE - 1) * NODE_LATENCY_SECONDS + math.log2(nodes) * NETWORK_LATENCY_SECONDS
    return within + among + calls * latency


if __name__ == "__main__":
    main()
