"""Part 4: the encoder, and what a decoder layer has in common with its layers."""

from ddetr.core.model.transformer import Encoder, EncoderLayer, TransformerLayer, encoder_reference_points

from .canvas import Box, Canvas, code, shape
from .record import Record
from .sources import place, quote, size_of

HEIGHT = 660


def draw(canvas: Canvas, record: Record, top: float, given: dict[str, Box]) -> dict[str, Box]:
    """Returns the boxes that later parts go on from: attention and memory."""
    config, model = record.config.model, record.model.transformer
    canvas.zone(4, "Encoder", "every token asks at its own place", Box(20, top, 520, HEIGHT), "§4.1, figure 1")
    points = record.call("encoder_reference_points").result
    references = canvas.box(
        "compute",
        Box(36, top + 46, 488, 84),
        "Reference points",
        [
            "a token's own pixel centre, relative to the image, then in each padded map",
            shape(f"reference_points {tuple(points.shape)}"),
        ],
        place(encoder_reference_points),
    )
    f = top + 146
    canvas.box("layer", Box(36, f, 488, 418), f"A layer of {config.encoder_layers}")
    canvas.text(146, f + 18, place(EncoderLayer), "place")
    states = record.modules["transformer.encoder.layers.0"].arguments
    tokens = canvas.box("data", Box(56, f + 42, 194, 26), "", [shape(f"tokens {tuple(states[0].shape)}")])
    position = canvas.box("data", Box(272, f + 42, 206, 26), "", [shape(f"position {tuple(states[1].shape)}")])
    query = canvas.plus(261, f + 98)
    canvas.arrow((226, tokens.y + tokens.h), (226, f + 98), query.left())
    canvas.arrow((320, position.y + position.h), (320, f + 98), query.right())
    canvas.text(275, f + 117, "query", "quiet")
    layer = model.encoder.layers[0]
    attention = canvas.box(
        "kernel",
        Box(96, f + 126, 356, 56),
        "self_attn",
        [code(quote(EncoderLayer, "tokens + position, reference_points, tokens"))],
        note="opened in part 5",
    )
    canvas.arrow(query.bottom(), (261, attention.y))
    canvas.arrow((151, tokens.y + tokens.h), (151, attention.y))
    canvas.text(146, f + 117, "value", "quiet", "end")
    canvas.arrow((496, references.y + references.h), (496, f + 140), attention.right(0.25))
    first = canvas.plus(261, f + 206)
    canvas.arrow((261, attention.y + attention.h), first.top())
    canvas.arrow((76, tokens.y + tokens.h), (76, f + 206), first.left())
    norm = normed(canvas, layer, 261, f + 226, first, "norm1")
    canvas.text(278, f + 216, f"dropout {config.dropout:g} before each sum", "quiet")
    canvas.text(344, f + 241, "layer norm", "quiet")
    memory = _end_of_layer(canvas, record, f, norm)
    roads = (
        ("tokens", "tokens", (28, tokens.left()[1]), tokens.left()),
        ("mask", "shapes, padding_mask, valid_ratios", (410, references.y - 20), (410, references.y)),
        ("position", "position", (532, position.right()[1]), position.right()),
    )
    for number, (name, label, turn, end) in enumerate(roads):
        start, bend, lane = given[name].right(), 2096 - 4 * number, top - 44 + 16 * number
        canvas.arrow(start, (bend, start[1]), (bend, lane), (turn[0], lane), turn, end)
        canvas.text(1460, lane - 4, label, "quiet")
    return {"attention": attention, "memory": memory}


def _end_of_layer(canvas: Canvas, record: Record, f: float, norm: Box) -> Box:
    """The rest of the layer, whose frame begins at height f, and the way back to its beginning; returns the memory."""
    config, layer = record.config.model, record.model.transformer.encoder.layers[0]
    end = feed_forward(canvas, layer, 261, f + 264, norm, "norm2")
    canvas.arrow(end.right(), (512, end.right()[1]), (512, f + 32), (151, f + 32), (151, f + 42))
    canvas.text(404, end.y + 7, f"x {config.encoder_layers}", "strong", "middle")
    memory = canvas.box(
        "data",
        Box(36, f + 434, 488, 62),
        f"memory {record.shape('transformer.encoder')}",
        [f"each token has read {config.levels * config.points} points with each head, once a layer"],
        place(Encoder.forward),
    )
    canvas.arrow(end.bottom(), (261, memory.y))
    return memory


def feed_forward(canvas: Canvas, layer: TransformerLayer, x: float, y: float, norm: Box, last: str) -> Box:
    """From the norm before it to the norm after it, which is returned; x is the middle of the flow."""
    box = canvas.box("compute", Box(x - 165, y, 356, 62), "", [], place(TransformerLayer))
    first = canvas.pill(x - 157, y + 8, "linear1", size_of(layer.linear1), 152)
    second = canvas.pill(x + 31, y + 8, "linear2", size_of(layer.linear2), 152)
    canvas.arrow(first.right(), second.left())
    canvas.text(x + 13, y + 38, "ReLU", "quiet", "middle")
    canvas.arrow((x, norm.y + norm.h), (x, box.y))
    total = canvas.plus(x, y + 84)
    canvas.arrow(norm.left(), (x - 185, norm.left()[1]), (x - 185, y + 84), total.left())
    canvas.arrow((x, box.y + box.h), total.top())
    return normed(canvas, layer, x, y + 104, total, last)


def normed(canvas: Canvas, layer: TransformerLayer, x: float, y: float, total: Box, name: str) -> Box:
    pill = canvas.pill(x - 70, y, name, f"({layer.get_submodule(name).normalized_shape[0]})", 140)
    canvas.arrow(total.bottom(), pill.top())
    return pill
