"""Parts 7 and 8: the decoder, and heads that refine boxes from layer to layer."""

from ddetr.core.model.detector import DeformableDetr, _shift, inverse_sigmoid
from ddetr.core.model.heads import MLP, class_head
from ddetr.core.model.outputs import Predictions
from ddetr.core.model.postprocess import detections
from ddetr.core.model.transformer import DecoderLayer, decoder_reference_points

from .attention import matched_query
from .canvas import Box, Canvas, Line, code, shape
from .encoder import feed_forward, normed
from .maps import PREDICTED, Maps
from .proposals import HEIGHT, box_head
from .record import Record
from .sources import cite, place, quote, size_of

X = 1000  # the middle of the layer's flow
GUTTER = 1414  # between parts 7 and 8


def draw(canvas: Canvas, maps: Maps, record: Record, top: float, given: dict[str, Box]) -> dict[str, Box]:
    """Returns the predictions' box."""
    canvas.zone(7, "Decoder", "queries take objects, then look", Box(748, top, 652, HEIGHT), "§4.1")
    references = canvas.box(
        "compute",
        Box(800, top + 46, 470, 84),
        "Reference boxes of this layer",
        [
            "times valid_ratios: from the image to every padded map",
            shape(f"reference_points {tuple(record.call('decoder_reference_points').result.shape)}"),
        ],
        place(decoder_reference_points),
    )
    first = given["reference"]
    canvas.arrow(first.right(), (727, first.right()[1]), (727, references.left(0.7)[1]), references.left(0.7))
    f = top + 148
    canvas.box("layer", Box(764, f, 620, 596), f"A layer of {record.config.model.decoder_layers}")
    canvas.text(874, f + 18, place(DecoderLayer), "place")
    queries, position, norm = _self_attention(canvas, record, f)
    source = given["queries"]
    canvas.arrow(source.right(0.75), (739, source.right(0.75)[1]), (739, queries.left()[1]), queries.left())
    turn = (733, source.right(0.25)[1])
    canvas.arrow(source.right(0.25), turn, (733, f + 25), (1120, f + 25), (1120, position.y))
    attention, norm = _cross_attention(canvas, record, f, position, norm)
    canvas.arrow((1240, references.y + references.h), (1240, attention.right(0.3)[1]), attention.right(0.3))
    memory, opened = given["memory"], given["opened"]
    lane = top - 20
    canvas.arrow(
        (430, memory.y + memory.h), (430, lane), (1300, lane), (1300, attention.right(0.7)[1]), attention.right(0.7)
    )
    canvas.text(1306, top + 100, "memory", "quiet")
    canvas.arrow(attention.left(), (756, attention.left()[1]), (756, opened.y + opened.h), kind="opens")
    end = feed_forward(canvas, record.model.transformer.decoder.layers[0], X, f + 442, norm, "norm3")
    canvas.arrow(end.right(), (1356, end.right()[1]), (1356, f + 32), (885, f + 32), queries.top())
    canvas.text(1180, end.y + 7, f"x {record.config.model.decoder_layers}", "strong", "middle")
    boxes, predictions = _heads(canvas, record, top, (1356, end.right()[1]))
    canvas.arrow(
        boxes.left(),
        (GUTTER - 6, boxes.left()[1]),
        (GUTTER - 6, references.right(0.3)[1]),
        references.right(0.3),
        kind="stop",
    )
    _refinement(canvas, maps, record, top)
    _instead(canvas, record, top)
    return {"predictions": predictions}


def _self_attention(canvas: Canvas, record: Record, f: float) -> tuple[Box, Box, Box]:
    """Returns the inputs queries and position, and the norm after it."""
    layer = record.model.transformer.decoder.layers[0]
    states = record.modules["transformer.decoder.layers.0"].arguments
    queries = canvas.box("data", Box(790, f + 42, 190, 26), "", [shape(f"queries {tuple(states[0].shape)}")])
    position = canvas.box("data", Box(1004, f + 42, 224, 26), "", [shape(f"query_position {tuple(states[1].shape)}")])
    placed = canvas.plus(X, f + 98)
    canvas.arrow((960, queries.y + queries.h), (960, f + 98), placed.left())
    canvas.arrow((1050, position.y + position.h), (1050, f + 98), placed.right())
    attention = layer.self_attn
    box = canvas.box(
        "compute",
        Box(X - 165, f + 124, 356, 78),
        "self_attn",
        ["who takes what: each query asks all others"],
        place(DecoderLayer.forward),
        note=f"{type(attention).__name__}, {attention.heads} heads",
    )
    canvas.arrow(placed.bottom(), (X, box.y))
    canvas.text(X + 8, f + 118, "query, key", "quiet")
    canvas.arrow((890, queries.y + queries.h), (890, box.y))
    canvas.text(884, f + 118, "value", "quiet", "end")
    total = canvas.plus(X, f + 222)
    canvas.arrow((X, box.y + box.h), total.top())
    canvas.arrow((806, queries.y + queries.h), (806, f + 222), total.left())
    return queries, position, normed(canvas, layer, X, f + 240, total, "norm2")


def _cross_attention(canvas: Canvas, record: Record, f: float, position: Box, norm: Box) -> tuple[Box, Box]:
    layer = record.model.transformer.decoder.layers[0]
    placed = canvas.plus(X, f + 284)
    canvas.arrow(norm.bottom(), placed.top())
    canvas.arrow((1210, position.y + position.h), (1210, f + 284), placed.right())
    attention = canvas.box(
        "kernel",
        Box(X - 165, f + 308, 356, 52),
        "cross_attn",
        [code(quote(DecoderLayer, "queries + position, reference_points, tokens"))],
        note="opened in part 5",
    )
    canvas.arrow(placed.bottom(), (X, attention.y))
    total = canvas.plus(X, f + 380)
    canvas.arrow((X, attention.y + attention.h), total.top())
    canvas.arrow(norm.left(), (X - 185, norm.left()[1]), (X - 185, f + 380), total.left())
    return attention, normed(canvas, layer, X, f + 398, total, "norm1")


def _heads(canvas: Canvas, record: Record, top: float, queries: tuple[float, float]) -> tuple[Box, Box]:
    """Returns the box of a layer's boxes and that of the predictions."""
    canvas.zone(
        8,
        "Heads and refinement",
        "of each layer",
        Box(1428, top, 672, HEIGHT),
        f"§4.2, {cite(_shift, 'appendix A.3')}",
    )
    model, predictions = record.model, record.predictions
    layers = len(model.transformer.decoder.layers)
    of_class = canvas.pill(1452, top + 50, f"class_embed.0-{layers - 1}", size_of(model.class_embed[0]), 182)
    of_box = canvas.pill(1452, top + 88, f"bbox_embed.0-{layers - 1}", box_head(model.bbox_embed[0]), 222)
    for pill in (of_class, of_box):
        canvas.arrow(queries, (GUTTER + 4, queries[1]), (GUTTER + 4, pill.left()[1]), pill.left(), free=True)
    logits = canvas.box("data", Box(1644, top + 48, 154, 26), "", [shape(f"logits {tuple(predictions.logits.shape)}")])
    canvas.arrow(of_class.right(), logits.left())
    shift = canvas.box(
        "compute",
        Box(1452, top + 132, 342, 100),
        "",
        [
            "the head says how far to move, in logits:",
            code(quote(DeformableDetr.forward, "_shift(reference, self.bbox_embed[head](queries))")),
            code(quote(DeformableDetr.forward, ".sigmoid()")),
        ],
        [place(_shift, inverse_sigmoid), place(MLP, class_head)],
    )
    canvas.arrow(of_box.bottom(), (of_box.bottom()[0], shift.y))
    boxes = canvas.box("data", Box(1560, top + 254, 190, 26), "", [shape(f"boxes {tuple(predictions.boxes.shape)}")])
    canvas.arrow((1655, shift.y + shift.h), boxes.top())
    canvas.text(1450, top + 262, quote(DeformableDetr.forward, "boxes.detach()"), "stop")
    earlier, (all_logits, all_boxes) = len(predictions.aux), predictions.proposals
    everything = canvas.box(
        "data",
        Box(1452, top + 306, 342, 118),
        "Predictions, float32",
        [
            shape(f"logits, boxes: of layer {layers - 1}"),
            shape(f"aux: {earlier} x (logits, boxes)"),
            shape(f"proposals: {tuple(all_logits.shape)},"),
            shape(f"           {tuple(all_boxes.shape)}"),
        ],
        place(Predictions),
    )
    canvas.arrow((1655, boxes.y + boxes.h), (1655, everything.y))
    canvas.arrow(logits.right(), (1806, logits.right()[1]), (1806, everything.right()[1]), everything.right())
    found = canvas.box(
        "compute",
        Box(1452, top + 448, 342, 82),
        "Detections, when evaluating",
        [f"the best {record.config.eval.top_k or 100} of queries x classes by sigmoid;", "no non-maximum suppression"],
        place(detections),
    )
    canvas.arrow((1623, everything.y + everything.h), found.top())
    return boxes, everything


def _instead(canvas: Canvas, record: Record, top: float) -> None:
    canvas.box(
        "instead",
        Box(1452, top + 552, 632, 82),
        "Instead, without box_refine (r50)",
        [
            "class_embed.0 and bbox_embed.0 serve all layers; the reference point stays:",
            code(quote(DeformableDetr.forward, "head = index if self.config.box_refine else 0")),
        ],
        place(DeformableDetr.forward),
    )
    canvas.box(
        "compute",
        Box(1452, top + 656, 632, 82),
        "Where gradients stop (red)",
        [
            "between the first stage and the decoder: proposals learn from their own losses;",
            "between the layers' boxes: each layer learns its own correction;",
            "at the matching: it chooses, it is not learned (@torch.no_grad).",
        ],
    )


def _refinement(canvas: Canvas, maps: Maps, record: Record, top: float) -> None:
    """One query's box from its reference through all layers."""
    query = matched_query(record)
    reference = record.call("_propose").result[3][0, query]
    outputs = [*(boxes for _, boxes in record.predictions.aux), record.predictions.boxes]
    boxes = [reference, *(boxes[0, query] for boxes in outputs)]
    x = 1828
    canvas.text(x, top + 58, "One query's boxes", "strong")
    where = maps.image(maps.box(x, top + 66, 256), 0, faint=True)
    maps.boxes(where, 0, reference[None], "#000000", 2)
    for number, box in enumerate(boxes[1:]):
        maps.boxes(where, 0, box[None], PREDICTED, 0.8 + 0.3 * number, f' stroke-opacity="{0.4 + 0.1 * number:.1f}"')
    canvas.text(x, top + 290, "black: its proposal; orange: after each layer", "quiet")
    canvas.lines(x, top + 300, [Line("code", "         cx    cy    w     h")])
    for number, box in enumerate(boxes):
        name = f"layer {number - 1}" if number else "proposal"
        numbers = " ".join(f"{value:.3f}" for value in box.tolist())
        canvas.lines(x, top + 318 + 16 * number, [Line("code", f"{name:9}{numbers}")])
