"""The picture's head, with its legend; at its foot what DETR does instead, and what the parts cost."""

import torch
from ddetr.core.config import load
from ddetr.core.model.cost import costs
from ddetr.core.model.criterion import _cross_entropy
from ddetr.core.model.detector import build
from ddetr.core.model.detr import Detr, DetrDecoderLayer, DetrEncoderLayer

from .canvas import Box, Canvas
from .maps import Maps
from .record import PRESET, Record
from .sources import place, size_of

LEGEND = (
    ("data", "data, (shape)"),
    ("compute", "computation"),
    ("kernel", "our own kernel"),
    ("parameter", "parameters"),
    ("frozen", "not trained"),
    ("instead", "what another model does"),
)

ARROW_LEGEND = (
    ("flow", "data"),
    ("stop", "data; no gradient comes back"),
    ("opens", "opened up elsewhere"),
)


def head(canvas: Canvas, record: Record) -> None:
    config = record.config.model
    canvas.text(20, 44, "Deformable DETR: one training step, from images to weights", "title")
    canvas.lines(
        20,
        56,
        [
            f"Preset {PRESET}. Every number comes from one forward pass of the real model with random weights, drawn "
            "by docs/draw_model.py; numbers 1 to 11 are the headings of docs/how-it-works.md.",
        ],
    )
    letters = (
        ("N", len(record.batch.images), "images"),
        ("S", record.call("_tokens").result[0].shape[1], "tokens"),
        ("Q", config.queries, "queries"),
        ("C", config.hidden_dim, "channels"),
        ("K", config.num_classes, "classes"),
        ("H", config.heads, "heads"),
        ("L", config.levels, "levels"),
        ("P", config.points, "points"),
    )
    text = "   ".join(f"{letter} = {value} {name}" for letter, value, name in letters)
    canvas.text(20, 92, f"{text}   § section of the paper, arXiv 2010.04159; of DETR: arXiv 2005.12872", "quiet")
    x = 1330
    for kind, text in LEGEND:
        if kind == "parameter":
            x = canvas.pill(x, 24, text).right()[0] + 14
            continue
        width = 16 + 7.6 * len(text)
        canvas.box(kind, Box(x, 24, width, 22), "", [])
        canvas.text(x + width / 2, 39, text, "quiet", "middle")
        x += width + 14
    x = 1330
    for kind, text in ARROW_LEGEND:
        canvas.arrow((x, 70), (x + 36, 70), kind=kind, free=True)
        canvas.text(x + 44, 74, text, "quiet")
        x += 74 + 7.2 * len(text)


def foot(canvas: Canvas, maps: Maps, record: Record, top: float) -> None:
    box = Box(20, top, 1240, 178)
    _detr(canvas, record, box)
    where = maps.level(maps.box(1070, top + 26, 178), 0, 2)
    height, width = maps.shapes[2]
    share_x, share_y = maps.valid[0].tolist()
    centres = [((x + 0.5) / width, (y + 0.5) / height) for y in range(height) for x in range(width)]
    read = [(x, y) for x, y in centres if x < share_x and y < share_y]
    maps.dots(where, read, "#6639ba", 2)
    maps.cross(where, *read[len(read) // 2 + width // 2])
    for line, text in enumerate((f"with each head a token reads all {len(read)}", "that are not padding")):
        canvas.text(1060, top + 152 + 16 * line, text, "quiet", "end")

    _cost(canvas, record, Box(1288, top, 812, 178))


def _detr(canvas: Canvas, record: Record, box: Box) -> None:
    config = load("detr_r50", ["model.pretrained_backbone=false"])
    with torch.device("meta"):
        detr = build(config.model).eval()
        assert isinstance(detr, Detr)
        shapes = []
        detr.input_proj.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
        predictions = detr(
            torch.empty(record.images.shape), torch.empty(record.batch.padding_mask.shape, dtype=torch.bool)
        )
    *_, height, width = shapes[0]
    tokens, ours = height * width, record.call("_tokens").result[0].shape[1]
    reads = record.config.model.levels * record.config.model.points
    canvas.box(
        "instead",
        box,
        "Instead, in DETR (detr_r50), the baseline",
        [
            f"One map: input_proj {size_of(detr.input_proj)} of C5, {height} x {width} = {tokens} tokens "
            f"(here S = {ours}). It cannot afford more, because",
            f"attention is ordinary: every token looks at every token, {tokens} x {tokens} = {tokens * tokens:,} "
            f"weights a head; with our {ours} tokens it would be {ours * ours:,}.",
            f"Deformable attention has {ours} x {reads} = {ours * reads:,}, linear in the number of tokens.",
            f"Queries: {size_of(detr.query_embed)} learned positions, contents begin at zero; no reference points: "
            "boxes come straight from the head.",
            f"Classes: softmax over {predictions.logits.shape[-1]}, the last of them 'no object' (weight "
            f"{config.optim.no_object_weight:g}), and cross entropy instead of focal loss.",
        ],
        [place(Detr, DetrEncoderLayer, DetrDecoderLayer), place(_cross_entropy)],
        paper="DETR §3",
    )


def _cost(canvas: Canvas, record: Record, box: Box) -> None:
    parts = costs(record.config.model, tuple(record.images.shape[-2:]))
    canvas.box(
        "compute",
        box,
        "What the parts cost",
        note="one image of this size; as `ddetr model` counts",
        place=place(costs),
    )
    trained = sum(cost.num_trained for cost in parts.values())
    flops = sum(cost.num_multiply_adds for cost in parts.values())
    y = box.y + 40
    canvas.text(box.x + 250, y, "parameters trained", "quiet", "end")
    canvas.text(box.x + 520, y, "multiply-adds", "quiet", "end")
    for row, (name, cost) in enumerate(parts.items()):
        y = box.y + 56 + 16 * row
        canvas.text(box.x + 9, y, name, "body")
        canvas.text(box.x + 210, y, f"{cost.num_trained / 1e6:.2f} M", "code", "end")
        _bar(canvas, Box(box.x + 222, y - 9, 130 * cost.num_trained / trained, 9))
        canvas.text(box.x + 520, y, f"{cost.num_multiply_adds / 1e9:.2f} G", "code", "end")
        _bar(canvas, Box(box.x + 532, y - 9, 260 * cost.num_multiply_adds / flops, 9))


def _bar(canvas: Canvas, box: Box) -> None:
    canvas.raw(f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.w:.1f}" height="{box.h:.1f}" fill="#57606a"/>')
