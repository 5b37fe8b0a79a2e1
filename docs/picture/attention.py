"""Part 5: deformable attention opened up, and the points that two queries really read."""

import torch
from ddetr.core.model.attention import MultiScaleDeformableAttention
from ddetr.ops import fused_deform_attn, reference

from .canvas import Box, Canvas, Line, code, quiet, shape
from .encoder import HEIGHT
from .maps import HEADS, Maps, level_name
from .record import NOISE, Record, Sampling
from .sources import cite, place, quote, size_of

QUERY_OBJECT = 3  # of image 0: the points of the query that is matched to it are drawn
TOKEN = (1, 0.52, 0.62)  # level, x, y in the padded map: the points of this token are drawn


def draw(canvas: Canvas, maps: Maps, record: Record, top: float, given: dict[str, Box]) -> dict[str, Box]:
    """Returns its own box."""
    zone = canvas.zone(
        5,
        "Multi-scale deformable attention",
        "each query reads a few points near its reference, in every map",
        Box(560, top, 1540, HEIGHT),
        cite(MultiScaleDeformableAttention, "section 4.1", "equation 3"),
    )
    _module(canvas, record, top)
    _equation(canvas, record, top)
    _insets(canvas, maps, record, top)
    start = given["attention"].right(0.75)
    canvas.arrow(start, (zone.x, start[1]), kind="opens")
    return {"opened": zone}


def _module(canvas: Canvas, record: Record, top: float) -> None:
    """What the module does around the op."""
    encoder = record.model.transformer.encoder.layers[-1].self_attn
    of_encoder, of_decoder = (
        record.attention(module) for module in (encoder, record.model.transformer.decoder.layers[-1].cross_attn)
    )
    y, columns, widths = top + 46, (576, 716, 892, 1036), (132, 168, 136, 136)

    def both(name: str) -> list[Line]:
        shapes = [getattr(sampling, name).shape for sampling in (of_encoder, of_decoder)]
        return [shape(f"{tuple(one)}") for one in shapes]

    points = canvas.box("data", Box(columns[0], y, widths[0], 60), "reference", both("reference"))
    query = canvas.box(
        "data",
        Box(columns[1], y, 312, 60),
        "query",
        [
            code(f"tokens + position   {tuple(record.modules['transformer.encoder'].result.shape)}"),
            code(f"queries + position  {(*of_decoder.logits.shape[:2], record.config.model.hidden_dim)}"),
        ],
    )
    tokens = canvas.box(
        "data",
        Box(columns[3], y, widths[3], 60),
        "tokens",
        [shape(f"{tuple(record.modules['transformer.encoder'].result.shape)}"), quiet("or memory")],
    )
    canvas.text(columns[0] + 4, y + 92, "first line:", "quiet")
    canvas.text(columns[0] + 4, y + 108, "the encoder,", "quiet")
    canvas.text(columns[0] + 4, y + 126, "second line:", "quiet")
    canvas.text(columns[0] + 4, y + 142, "the decoder", "quiet")
    parameters, results = [], []
    names = ("sampling_offsets", "attention_weights", "value_proj")
    for x, width, name in zip(columns[1:], widths[1:], names, strict=True):
        linear = getattr(encoder, name)
        box = canvas.box(
            "parameter", Box(x, y + 78, width, 42), "", [Line("parameter", name), Line("parameter", size_of(linear))]
        )
        source = tokens if name == "value_proj" else query
        canvas.arrow((x + width / 2, source.y + source.h), box.top())
        parameters.append(box)
    for box, name in zip(parameters, ("offsets", "logits", "value"), strict=True):
        lines = [both(name)[0], quiet("0 on padding")] if name == "value" else both(name)
        result = canvas.box("data", Box(box.x, y + 138, box.w, 60), name, lines)
        canvas.arrow(box.bottom(), result.top())
        results.append(result)
    specification = reference.fused_deform_attn
    kernel = canvas.box(
        "kernel",
        Box(columns[0], y + 216, 596, 186),
        "fused_deform_attn: one kernel, forward and backward",
        [
            "weights: softmax over all levels and points of a head",
            code("    " + quote(specification, "attention_logits.to(dtype).softmax(-1)")),
            "locations, around a reference point (two numbers: the encoder, the plain decoder)",
            code("    " + quote(specification, "reference + offsets / sizes[:, None, :]")),
            "or in a reference box (four numbers: refined and two-stage decoders, §A.4)",
            code("    " + quote(specification, "reference[..., :2] + offsets / points * reference[..., 2:] * 0.5")),
            "then bilinear samples, zero outside the map, and their weighted sum",
        ],
        [f"{place(fused_deform_attn)}", f"{place(specification)} (in plain torch)"],
    )
    for box in (points, *results):
        x = box.x + (0.86 if box == points else 0.5) * box.w
        canvas.arrow((x, box.y + box.h), (x, kernel.y))
    output = canvas.box(
        "parameter",
        Box(columns[1], y + 418, 190, 26),
        "",
        [Line("parameter", f"output_proj {size_of(encoder.output_proj)}")],
    )
    canvas.arrow((output.x + 95, kernel.y + kernel.h), output.top())
    attended = canvas.box(
        "data",
        Box(columns[3] - 60, y + 418, 196, 26),
        "",
        [shape(f"attended {tuple(record.shape('transformer.encoder.layers.0.self_attn'))}")],
    )
    canvas.arrow(output.right(), attended.left())


def _equation(canvas: Canvas, record: Record, top: float) -> None:
    config = record.config.model
    right_side = "Σ_{m} W_{m} [ Σ_{l} Σ_{k} A_{mlqk} W′_{m} x^{l}(φ_{l}(p̂_{q}) + Δp_{mlqk}) ]"
    box = canvas.box(
        "paper",
        Box(576, top + 504, 596, 140),
        "",
        [Line("formula", f"MSDeformAttn(z_{{q}}, p̂_{{q}}, x) = {right_side}")],
    )
    rows = [
        ("z_{q}", "query"),
        ("p̂_{q}, φ_{l}", "reference, in map l"),
        ("Δp_{mlqk}", "sampling_offsets"),
        ("A_{mlqk}", "softmax of attention_weights"),
        ("W′_{m} x^{l}", "value_proj of tokens of map l"),
        ("W_{m}", "output_proj"),
        ("L = 1", "equation 2: a single map"),
        ("m, l, k", f"{config.heads} heads, {config.levels} levels, {config.points} points"),
    ]
    for index, (symbol, name) in enumerate(rows):
        x, y = box.x + 12 + 292 * (index // 4), box.y + 56 + 21 * (index % 4)
        canvas.text(x, y, symbol, "math")
        canvas.text(x + 76, y, name, "quiet")


def _insets(canvas: Canvas, maps: Maps, record: Record, top: float) -> None:
    """Real points of one token of the encoder's last layer and one query of the decoder's last layer, in image 0."""
    transformer = record.model.transformer
    level, x, y = TOKEN
    shapes = record.call("_tokens").result[2]
    height, width = shapes[level]
    token = sum(h * w for h, w in shapes[:level]) + int(y * height) * width + int(x * width)
    query = matched_query(record)
    box = record.call("decoder_reference_points").arguments[0][0, query]
    numbers = ", ".join(f"{number:.3f}" for number in box.tolist())
    points = record.config.model.points
    rows = (
        (
            record.attention(transformer.encoder.layers[-1].self_attn),
            token,
            f"One token in the last layer of the encoder, a pixel of {level_name(level)}: "
            "offsets from it (cross) are in pixels of each map.",
        ),
        (
            record.attention(transformer.decoder.layers[-1].cross_attn),
            query,
            f"One query in the last layer of the decoder, box ({numbers}) as cx, cy, w, h: "
            f"an offset of {points} reaches its edge.",
        ),
    )
    for row, (sampling, index, title) in enumerate(rows):
        y = top + 62 + row * 236
        canvas.text(1192, y, title, "strong")
        for level in range(len(shapes)):
            where = maps.level(maps.box(1192 + level * 226, y + 10, 214), 0, level)
            share = maps.sampling(where, sampling, 0, index, level)
            if level < 2 and row == 0:
                _magnified(maps, sampling, index, level, where)
            stride = record.images.shape[-1] // shapes[level][1]
            text = f"{level_name(level)}, stride {stride}: {100 * share:.1f} % of the weight"
            canvas.text(where.x, where.y + where.h + 17, text, "quiet")
    _legend(canvas, record, top + 532)


def matched_query(record: Record) -> int:
    """The query of image 0 that the last layer's matching gives to QUERY_OBJECT."""
    queries, objects = record.matches[0][-1][0]
    return int(queries[objects.tolist().index(QUERY_OBJECT)])


def _magnified(maps: Maps, sampling: Sampling, query: int, level: int, where: Box) -> None:
    """The part of a map around the points, larger, in a corner of it."""
    x, y = sampling.reference[0, query, level].tolist()
    share = 0.16 * 2**level
    view = Box(x - share / 2, y - share / 2, share, share)
    side = where.w * 0.4
    corner = Box(where.x + where.w - side - 4, where.y + 4, side, side * 0.8)
    maps.padded_boxes(where, torch.tensor([[x, y, share, share]]), "#24292f", 0.8)
    maps.level(corner, 0, level, view)
    maps.sampling(corner, sampling, 0, query, level, view)


def _legend(canvas: Canvas, record: Record, top: float) -> None:
    config = record.config.model
    canvas.box(
        "compute",
        Box(1192, top, 892, 112),
        "The dots, by head",
        [
            f"Each head has {config.points} points in each map. A dot's area is its attention weight, its colour the "
            "head; points outside a map (not drawn) read zero.",
            f"In a fresh model head h looks in direction 2 pi h / {config.heads}, point k at distance k, and all "
            f"weights are equal ({cite(MultiScaleDeformableAttention.reset_parameters, 'appendix A.4')}).",
            quiet(
                f"Here the rows that begin at zero are noise of deviation {NOISE['sampling_offsets']:g} or so. "
                "`ddetr explain` draws the points of a trained model on a photo."
            ),
        ],
        place(MultiScaleDeformableAttention.forward, MultiScaleDeformableAttention.reset_parameters),
    )
    for head, colour in enumerate(HEADS):
        canvas.raw(f'<circle cx="{1356 + 46 * head}" cy="{top + 13.5:.1f}" r="5" fill="{colour}"/>')
        canvas.text(1365 + 46 * head, top + 18, f"{head}", "quiet")
