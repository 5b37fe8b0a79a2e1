"""Parts 1 to 3: a batch, the backbone, the tokens of all levels."""

from ddetr.core.model.backbone import Backbone
from ddetr.core.model.detector import DeformableDetr, Transformer
from ddetr.core.model.frozen_norm import freeze_batch_norms
from ddetr.core.model.position import sine_position
from ddetr.data.batch import Batch, collate, normalised
from torch import nn

from .canvas import Box, Canvas, Line, code, quiet, shape
from .maps import LEVELS, TRUTH, Maps, level_name
from .record import Record
from .sources import cite, place, quote, size_of

HEIGHT = 440
ROW = 80  # from one level's lane to the next


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def draw(canvas: Canvas, maps: Maps, record: Record, top: float) -> dict[str, Box]:
    """Returns the boxes that later parts go on from: tokens, position, mask."""
    batch, images = _batch(canvas, maps, record, top)
    features = _backbone(canvas, record, top, images)
    return _tokens(canvas, maps, record, top, features, batch)


def _batch(canvas: Canvas, maps: Maps, record: Record, top: float) -> tuple[Box, Box]:
    canvas.zone(1, "Batch", "two images, padded to one size", Box(20, top, 500, HEIGHT))
    batch = record.batch
    boxes = batch.boxes_cxcywh.split(batch.num_boxes.tolist())
    for number, (x, of_image) in enumerate(zip((36, 276), boxes, strict=True)):
        where = maps.image(maps.box(x, top + 46, 228), number)
        maps.boxes(where, number, of_image, TRUTH, 2.2)
        height, width = batch.original_sizes[number].tolist()
        canvas.text(x, top + 246, f"image {number}: {height} x {width}, {len(of_image)} objects", "quiet")
    canvas.text(504, top + 262, "hatched: padding", "quiet", "end")
    packed = canvas.box(
        "data",
        Box(36, top + 270, 264, 150),
        "Batch",
        [
            shape(f"images {tuple(batch.images.shape)} uint8"),
            shape(f"padding_mask {tuple(batch.padding_mask.shape)}"),
            shape(f"boxes_cxcywh {tuple(batch.boxes_cxcywh.shape)} in [0, 1]"),
            shape(f"labels {tuple(batch.labels.shape)}"),
            shape(f"num_boxes {batch.num_boxes.tolist()}"),
            quiet("boxes of all images, one after another"),
        ],
        place(Batch, collate),
    )
    normal = canvas.box(
        "compute",
        Box(318, top + 270, 186, 150),
        "Normalise",
        [
            "(image - mean) / deviation",
            "of ImageNet, 0 on padding,",
            "on the device",
            shape(f"{tuple(record.images.shape)}"),
            shape("float32 or half"),
        ],
        place(normalised),
    )
    canvas.arrow(packed.right(), normal.left())
    return packed, normal


def _backbone(canvas: Canvas, record: Record, top: float, images: Box) -> list[Box]:
    """Returns C3, C4 and C5."""
    canvas.zone(2, "Backbone", f"timm {record.config.model.backbone.split('.')[0]}", Box(540, top, 400, HEIGHT), "§4.1")
    body = record.model.backbone.body
    stages = dict(body.named_children())
    outputs = record.modules["backbone"].result
    names = [f"layer{number}" for number in (1, 2, 3, 4)]
    before = [module for name, module in stages.items() if name not in names]
    first = [*before, stages["layer1"]]
    assert not any(p.requires_grad for module in first for p in module.parameters())
    frozen = sum(p.numel() for module in first for p in module.parameters())
    stage = canvas.box(
        "frozen",
        Box(556, top + 46, 368, 56),
        "stem and layer1",
        [quiet(f"{millions(frozen)} parameters, not trained, with all batch norms")],
        note="stride 4, not used as a map",
    )
    bend = 530
    canvas.arrow(images.right(), (bend, images.right()[1]), (bend, stage.left()[1]), stage.left())
    features = []
    for level, output in enumerate(outputs):
        name, y = names[level + 1], top + 114 + level * ROW
        assert output.shape == record.shape(f"backbone.body.{name}")
        trained = sum(p.numel() for p in stages[name].parameters() if p.requires_grad)
        box = canvas.box(
            "compute", Box(556, y, 156, 62), name, [quiet(f"{millions(trained)} trained"), quiet("parameters")]
        )
        canvas.arrow((634, stage.y + stage.h), box.top())
        stride = record.images.shape[-1] // output.shape[-1]
        feature = canvas.box(
            "data", Box(744, y, 180, 62), level_name(level), [shape(f"{tuple(output.shape)}")], note=f"stride {stride}"
        )
        canvas.arrow(box.right(), feature.left())
        stage, features = box, [*features, feature]
    canvas.box(
        "compute",
        Box(556, top + 356, 324, 66),
        "",
        ["pretrained; frozen norms folded into convolutions"],
        [place(Backbone), place(freeze_batch_norms)],
    )
    return features


def _tokens(canvas: Canvas, maps: Maps, record: Record, top: float, features: list[Box], batch: Box) -> dict[str, Box]:
    canvas.zone(
        3,
        "Tokens",
        "four maps of one width, then one sequence; no FPN, as attention joins the levels",
        Box(960, top, 1140, HEIGHT),
        cite(DeformableDetr._tokens, "section 4.1"),
    )
    tokens, position, shapes, mask, ratios = record.call("_tokens").result
    bus = 1526
    goal = canvas.box(
        "data",
        Box(1546, top + 46, 538, 88),
        f"tokens {tuple(tokens.shape)}",
        [quiet("every pixel of every level, one level after another, row by row:")],
        note=f"S = {tokens.shape[1]}",
    )
    _bar(canvas, goal, [height * width for height, width in shapes])
    canvas.lines(
        976,
        top + 44,
        [
            f"Each map to {tokens.shape[2]} channels; a fourth one, C6, from C5 by stride 2.",
            quiet("Then flattened: a pixel of a map is a token."),
            Line("place", place(DeformableDetr._tokens, Transformer)),
        ],
    )
    for level, (height, width) in enumerate(shapes):
        y = top + 114 + level * ROW
        convolution, norm = record.model.input_proj[level]
        assert isinstance(norm, nn.GroupNorm)
        project = canvas.box("compute", Box(976, y, 282, 62), "", [])
        canvas.pill(983, y + 7, f"input_proj.{level}", size_of(convolution), 268)
        canvas.text(992, y + 50, f"convolution, then group norm ({norm.num_groups})", "quiet")
        if level < len(features):
            canvas.arrow(features[level].right(), project.left())
        else:
            x = features[-1].right()[0] - 24
            canvas.arrow((x, features[-1].y + features[-1].h), (x, y + 31), project.left())
        picture = maps.level(maps.box(1272, y + 31 - 0.4 * 84, 84), 0, level)
        canvas.arrow(project.right(), picture.left())
        output = record.shape(f"input_proj.{level}")
        flat = canvas.box(
            "data", Box(1370, y, 142, 62), level_name(level), [shape(f"{output}"), quiet(f"{height * width} tokens")]
        )
        canvas.arrow(picture.right(), flat.left())
        canvas.arrow(flat.right(), (bus, y + 31), tip=False, free=True)
    canvas.arrow((bus, top + 114 + 3 * ROW + 31), (bus, goal.left()[1]), goal.left(), free=True)

    place_box = canvas.box(
        "compute",
        Box(1546, top + 146, 538, 134),
        "Where a token is: position",
        [
            f"y and x, counted in unpadded pixels and scaled to 2 pi, as waves of {position.shape[2] // 4} lengths;",
            "and of which level: a learned vector, the same for all its tokens",
            code(quote(DeformableDetr._tokens, "positions.append(position.flatten(2).transpose(1, 2) + level_embed)")),
        ],
        place(sine_position),
    )
    embedding = record.model.transformer.level_embed
    canvas.pill(1555, top + 228, "level_embed", size_of(embedding))
    canvas.text(1733, top + 243, f"position {tuple(position.shape)}", "shape")
    mask_box = canvas.box(
        "data",
        Box(1546, top + 292, 538, 130),
        "What is padding: padding_mask, valid_ratios",
        [
            shape(f"padding_mask {tuple(mask.shape)}   valid_ratios {tuple(ratios.shape)}"),
            *(
                f"image {n}: a share of {x:.2f} of each map's width and {y:.3f} of its height is image"
                for n, (x, y) in enumerate(ratios[:, 0].tolist())
            ),
            quiet("Boxes and reference points are relative to the image, sampling locations to the padded"),
            quiet("map; valid_ratios lead from one to the other."),
        ],
    )
    y = top + 431
    canvas.arrow((168, batch.y + batch.h), (168, y), (1800, y), (1800, mask_box.y + mask_box.h))
    return {"tokens": goal, "position": place_box, "mask": mask_box}


def _bar(canvas: Canvas, box: Box, counts: list[int]) -> None:
    """How the sequence divides among the levels."""
    x, y, width = box.x + 9, box.y + 46, box.w - 18
    for level, count in enumerate(counts):
        share = width * count / sum(counts)
        canvas.raw(f'<rect x="{x:.1f}" y="{y:.1f}" width="{share:.1f}" height="16" fill="{LEVELS[level]}"/>')
        if level == 0:
            canvas.text(x + share / 2, y + 31, f"{level_name(level)}: {count}", "quiet", "middle")
        x += share
    rest = ", ".join(f"{level_name(level)}: {count}" for level, count in enumerate(counts) if level)
    canvas.text(box.x + box.w - 9, y + 31, rest, "quiet", "end")
