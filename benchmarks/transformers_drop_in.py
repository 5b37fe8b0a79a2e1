"""Deformable DETR of Hugging Face transformers with its own sampling core, and with `deform_attn` in its place.

    python benchmarks/transformers_drop_in.py                   # CPU, one thread
    python benchmarks/transformers_drop_in.py --threads 2

One model (ResNet-50, 6 + 6 layers, 300 queries, random weights) and one image in float32. After a check that both cores
detect the same, they take turns, so that a busy machine slows both. The forward pass is that of detection; the training
step is forward with labels, matching and auxiliary losses, backward and AdamW. With one thread the clock is the
process's own CPU time.

Shapes: value (N, S, H, D) with N = 1 image, S positions of all levels, H = 8 heads, D = 32 channels of a head.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from ddetr.ops import deform_attn, library
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrForObjectDetection,
    MultiScaleDeformableAttention,
)

NUM_OBJECTS, NUM_CLASSES = 8, 91


def drop_in(
    self: MultiScaleDeformableAttention,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The replacement of docs/op.md."""
    return deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


CORES: dict[str, Callable[..., Tensor]] = {
    "transformers": MultiScaleDeformableAttention.forward,
    "drop-in": drop_in,
}


def detector() -> DeformableDetrForObjectDetection:
    """The published model without box refinement: what the configuration's defaults describe."""
    values = {"auxiliary_loss": True, "num_labels": NUM_CLASSES, "use_pretrained_backbone": False}
    return DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**values))


def milliseconds(function: Callable[[], object], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    function()
    return (clock() - begin) * 1e3


def measure(
    model: DeformableDetrForObjectDetection,
    images: Tensor,
    labels: list[dict[str, Tensor]],
    options: argparse.Namespace,
) -> dict[str, tuple[list[float], list[float]]]:
    """Times of the forward pass and of the training step with every core, taken in turns; one round warms up."""
    # Small enough that the weights of all rounds stay near the first ones.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6)

    def detect() -> Any:
        with torch.no_grad():
            return model(images)

    def train() -> None:
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()

    check(model.eval(), detect)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in CORES}
    for repeat in range(options.repeats + 1):
        for name, core in CORES.items():
            MultiScaleDeformableAttention.forward = core
            model.eval()
            forward = milliseconds(detect, options.threads)
            model.train()
            step = milliseconds(train, options.threads)
            if repeat > 0:
                times[name][0].append(forward)
                times[name][1].append(step)
    return times


def check(model: DeformableDetrForObjectDetection, detect: Callable[[], Any]) -> None:
    results = []
    for core in CORES.values():
        MultiScaleDeformableAttention.forward = core
        outputs = detect()
        results.append((outputs.logits, outputs.pred_boxes))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="height and width of the image")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = detector()
    images = torch.randn(1, 3, options.size, options.size)
    centres, sides = torch.rand(NUM_OBJECTS, 2) * 0.6 + 0.2, torch.rand(NUM_OBJECTS, 2) * 0.3 + 0.05
    labels = [{"class_labels": torch.randint(NUM_CLASSES, (NUM_OBJECTS,)), "boxes": torch.cat([centres, sides], dim=1)}]
    times = measure(model, images, labels, options)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"best path {library.cpu_capability()}, {options.threads} thread(s), milliseconds as minimum (median)\n"
    )
    print("| image | type | core | forward | training step | forward: times faster | training step: times faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, parts in times.items():
        cells = [f"{min(part):.0f} ({statistics.median(part):.0f})" for part in parts]
        ratios = [f"{min(own) / min(part):.2f}" for own, part in zip(times["transformers"], parts, strict=True)]
        print("| " + " | ".join([f"1x3x{options.size}x{options.size}", "float32", name, *cells, *ratios]) + " |")


if __name__ == "__main__":
    main()
