"""Part 6: the first stage, and what the plain model does instead."""

import torch
from ddetr.core.config import load
from ddetr.core.model.detector import DeformableDetr, _anchors, build
from ddetr.core.model.position import proposal_position
from torch import Tensor, nn

from .canvas import Box, Canvas, Line, code, quiet, shape
from .maps import LEVELS, Maps, level_name
from .record import Record
from .sources import cite, place, quote, size_of

HEIGHT = 760
LEFT, RIGHT = 58, 272  # of the two columns


def draw(canvas: Canvas, maps: Maps, record: Record, top: float, given: dict[str, Box]) -> dict[str, Box]:
    """Returns the boxes that later parts go on from: proposals, reference, queries."""
    canvas.zone(
        6,
        "First stage",
        "every token proposes a box",
        Box(20, top, 700, HEIGHT),
        cite(DeformableDetr._propose, "section 4.2", "appendix A.4"),
    )
    proposals = _proposals(canvas, record, top, given["memory"])
    boxes = _queries(canvas, record, top, proposals)
    _insets(canvas, maps, record, top)
    _instead(canvas, top + 648)
    return boxes | {"proposals": proposals}


def box_head(head: nn.Module) -> str:
    """`256 → 256 → 256 → 4`, shortened."""
    return f"{head.layers[0].in_features} → .. → {head.output_layer.out_features}"


def _proposals(canvas: Canvas, record: Record, top: float, memory: Box) -> Box:
    model, config = record.model, record.config.model
    anchors, usable = record.call("_anchors").result
    logits, boxes = record.call("_propose").result[0]
    sizes = ", ".join(f"{config.proposal_size * 2**level:g}" for level in range(config.levels))
    anchor = canvas.box(
        "compute",
        Box(LEFT, top + 46, 400, 98),
        "Anchors",
        [
            f"a box on each token, its sides {sizes} of the image's",
            f"usable: not padding, numbers in (0.01, 0.99): {', '.join(str(n) for n in usable.sum(1).tolist())}",
            shape(f"logits of boxes {tuple(anchors.shape)}, inf if not usable"),
        ],
        place(_anchors),
    )
    masked = canvas.box(
        "compute",
        Box(LEFT, top + 162, 400, 26),
        "",
        [code(quote(DeformableDetr._propose, "memory.masked_fill(~usable[..., None], 0.0)"))],
    )
    canvas.arrow((RIGHT + 93, anchor.y + anchor.h), (RIGHT + 93, masked.y))
    lane = top - 26
    canvas.arrow((60, memory.y + memory.h), (60, lane), (28, lane), (28, masked.left()[1]), masked.left())
    y = top + 206
    output = canvas.pill(LEFT, y, "enc_output", size_of(model.transformer.enc_output), 186)
    size = model.transformer.enc_output_norm.normalized_shape[0]
    norm = canvas.pill(RIGHT, y, "enc_output_norm", f"({size})", 186)
    canvas.arrow((LEFT + 93, masked.y + masked.h), output.top())
    canvas.arrow(output.right(), norm.left())
    last = len(model.class_embed) - 1
    of_class = canvas.pill(LEFT, y + 46, f"class_embed.{last}", size_of(model.class_embed[-1]), 186)
    of_box = canvas.pill(RIGHT, y + 46, f"bbox_embed.{last}", box_head(model.bbox_embed[-1]), 186)
    canvas.arrow(norm.bottom(), of_box.top())
    canvas.arrow((RIGHT + 30, y + 22), (RIGHT + 30, y + 34), (LEFT + 93, y + 34), of_class.top())
    total = canvas.plus(RIGHT + 93, y + 90)
    canvas.arrow(of_box.bottom(), total.top())
    canvas.arrow(anchor.right(), (466, anchor.right()[1]), (466, total.right()[1]), total.right())
    found = canvas.box(
        "data",
        Box(LEFT, y + 112, 400, 44),
        "proposals",
        [shape(f"logits {tuple(logits.shape)}      boxes {tuple(boxes.shape)}")],
        note="trained like a layer, parts 9, 10",
    )
    canvas.arrow(of_class.bottom(), (LEFT + 93, found.y))
    canvas.arrow(total.bottom(), (RIGHT + 93, found.y))
    return found


def _queries(canvas: Canvas, record: Record, top: float, proposals: Box) -> dict[str, Box]:
    """The best proposals become references and queries."""
    transformer = record.model.transformer
    _, queries, position, reference = record.call("_propose").result
    best = canvas.box(
        "compute",
        Box(LEFT, top + 384, 186, 46),
        f"The best {queries.shape[1]}",
        [code(quote(DeformableDetr._propose, "logits[..., 0].topk("))],
    )
    gather = canvas.box(
        "compute",
        Box(RIGHT, top + 384, 186, 46),
        "Their boxes",
        [code(quote(DeformableDetr._propose, "unactivated.gather("))],
    )
    canvas.arrow((LEFT + 93, proposals.y + proposals.h), best.top())
    canvas.arrow((RIGHT + 93, proposals.y + proposals.h), gather.top())
    canvas.arrow(best.right(), gather.left())
    references = canvas.box("data", Box(RIGHT, top + 481, 186, 26), "", [shape(f"reference {tuple(reference.shape)}")])
    canvas.arrow(gather.bottom(), references.top(), kind="stop")
    canvas.text(RIGHT + 103, top + 452, quote(DeformableDetr._propose, "detach"), "stop")
    embedded = record.call("proposal_position").result
    waves = canvas.box(
        "compute",
        Box(LEFT, top + 520, 400, 42),
        f"Sines of the boxes {tuple(embedded.shape)}",
        [],
        place(proposal_position),
    )
    canvas.arrow((RIGHT + 93, references.y + references.h), (RIGHT + 93, waves.y))
    first = canvas.pill(LEFT, top + 576, "pos_trans", size_of(transformer.pos_trans), 186)
    size = transformer.pos_trans_norm.normalized_shape[0]
    second = canvas.pill(RIGHT, top + 576, "pos_trans_norm", f"({size})", 186)
    canvas.arrow((LEFT + 93, waves.y + waves.h), first.top())
    canvas.arrow(first.right(), second.left())
    halves = canvas.box(
        "data",
        Box(LEFT, top + 610, 400, 26),
        "",
        [shape(f"query_position {tuple(position.shape)}, queries {tuple(queries.shape)}")],
    )
    canvas.arrow(second.bottom(), (RIGHT + 93, halves.y))
    return {"reference": references, "queries": halves}


def _insets(canvas: Canvas, maps: Maps, record: Record, top: float) -> None:
    """In image 0: one anchor of each level, and the centres of the best proposals."""
    shapes = record.call("_tokens").result[2]
    ends = torch.tensor([height * width for height, width in shapes]).cumsum(0)
    x = 484
    canvas.text(x, top + 58, "An anchor of each level", "strong")
    where = maps.image(maps.box(x, top + 66, 220), 0, faint=True)
    anchors = record.call("_anchors").result[0][0]
    for level, (height, width) in enumerate(shapes):
        share_x, share_y = maps.valid[0].tolist()
        row, column = int(height * share_y * 0.5), int(width * share_x * 0.5)
        token = int(ends[level]) - height * width + row * width + column
        maps.boxes(where, 0, anchors[token][None].sigmoid(), LEVELS[level], 2)
    reference, chosen = record.call("_propose").result[3][0], _chosen(record)
    canvas.text(x, top + 262, f"The best {len(chosen)}: centres", "strong")
    where = maps.image(maps.box(x, top + 270, 220), 0, faint=True)
    level_of = torch.bucketize(chosen, ends, right=True)
    scale = maps.valid[0]
    for level, colour in enumerate(LEVELS):
        centres = sorted(tuple(row) for row in (reference[level_of == level, :2] * scale).tolist())
        maps.dots(where, centres, colour, 1.6 + 0.5 * level)
        column, row = x + 112 * (level % 2), top + 462 + 16 * (level // 2)
        canvas.raw(f'<circle cx="{column + 5}" cy="{row - 4}" r="4.5" fill="{colour}"/>')
        canvas.text(column + 14, row, f"{int((level_of == level).sum())} of {level_name(level)}", "quiet")


def _chosen(record: Record) -> Tensor:
    """Tokens of the best proposals of image 0, in the order of the references."""
    logits = record.call("_propose").result[0][0]
    return logits[0, :, 0].topk(record.config.model.queries).indices


def _instead(canvas: Canvas, y: float) -> None:
    with torch.device("meta"):
        plain = build(load("r50", ["model.pretrained_backbone=false"]).model)
    assert isinstance(plain, DeformableDetr)
    box = canvas.box(
        "instead",
        Box(LEFT, y, 646, 96),
        "Instead, in the plain model (r50, r50_refine): learned, the same for every image",
    )
    points = plain.transformer.reference_points
    embedding = canvas.pill(LEFT + 12, y + 25, "query_embed", size_of(plain.query_embed))
    canvas.lines(
        embedding.x + embedding.w + 8,
        y + 26,
        [Line("quiet", "two halves: query_position and queries")],
    )
    linear = canvas.pill(LEFT + 12, y + 50, "reference_points", size_of(points))
    canvas.lines(
        linear.x + linear.w + 8,
        y + 51,
        [quiet(f"of query_position, then sigmoid: a point ({points.out_features} numbers), not a box")],
    )
    canvas.lines(LEFT + 12, y + 74, [Line("place", place(DeformableDetr.forward))])
    canvas.text(box.x + box.w - 9, y + 86, "§4.1", "paper", "end")
