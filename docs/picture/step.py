"""Parts 9 to 11: matching, losses, the optimizer step."""

from ddetr.core.model.criterion import Losses, _focal, _l1, criterion
from ddetr.core.model.finite import finite_or_poison
from ddetr.core.model.matcher import Matching, _assign, _cost
from ddetr.core.model.transfer import HostCopy
from ddetr.core.training.engine import Engine, deepspeed_config
from ddetr.core.training.optimizer import SLOW, parameter_groups
from ddetr.core.training.trainer import train_step
from ddetr.data.boxes import generalized_box_iou, paired_generalized_box_iou

from .canvas import Box, Canvas, code, math, quiet, shape
from .features import millions
from .maps import PREDICTED, TRUTH, Maps
from .record import Record
from .sources import cite, place, quote

HEIGHT = 424


def draw(canvas: Canvas, maps: Maps, record: Record, top: float, given: dict[str, Box]) -> None:
    solved = _matching(canvas, maps, record, top)
    frame, table = _losses(canvas, record, top)
    loss = _step(canvas, record, top)
    canvas.arrow(solved["solve"].right(), (714, solved["solve"].right()[1]), (714, frame.left()[1]), frame.left())
    canvas.arrow(table.right(), (1434, table.right()[1]), (1434, loss.left()[1]), loss.left())

    predictions, proposals, cost = given["predictions"], given["proposals"], solved["cost"]
    start, bend = predictions.left(0.86), 1436
    canvas.arrow(start, (bend, start[1]), (bend, top - 10), (404, top - 10), (404, cost.y), kind="stop")
    start, bend = predictions.left(0.5), 1444
    canvas.arrow(start, (bend, start[1]), (bend, top - 20), (1180, top - 20), (1180, frame.y))
    start, lane = proposals.left(), top - 30
    canvas.arrow(start, (40, start[1]), (40, lane), (1160, lane), (1160, frame.y))
    canvas.arrow((384, lane), (384, cost.y), kind="stop", free=True)
    canvas.text(412, top + 14, "@torch.no_grad", "stop")


def _matching(canvas: Canvas, maps: Maps, record: Record, top: float) -> dict[str, Box]:
    source = f"DETR §3.1, {cite(_cost, 'equation 1')}"
    canvas.zone(9, "Matching", "one query for each object", Box(20, top, 680, HEIGHT), source)
    optim = record.config.optim
    of_layers, of_proposals = (tuple(call.result.shape) for call in record.functions["_cost"])
    cost = canvas.box(
        "compute",
        Box(36, top + 46, 380, 146),
        "What each query would cost each object",
        [
            math(f"{optim.class_weight:g} · class + {optim.l1_weight:g} · L1 - {optim.giou_weight:g} · GIoU"),
            "class: its focal loss if an object's, less that if nothing's;",
            "for the proposals every object is of class 0",
            shape(f"layers    {of_layers}"),
            shape(f"proposals {of_proposals}"),
        ],
        [place(_cost), place(generalized_box_iou)],
    )
    (numbers,) = record.call("HostCopy").arguments[0].shape
    copy = canvas.box(
        "compute",
        Box(36, top + 212, 380, 84),
        f"One copy to the host: {numbers} numbers",
        [
            "all layers' costs; of the proposals an object's best",
            f"{of_proposals[2]}, the most objects of an image, are enough",
        ],
        place(HostCopy),
    )
    canvas.arrow(cost.bottom(), copy.top())
    solve = canvas.box(
        "compute",
        Box(36, top + 316, 380, 86),
        "The least total cost",
        [
            code(quote(_assign, "linear_sum_assignment(costs)")),
            quiet("Hungarian algorithm (scipy), for each layer and image"),
        ],
        place(Matching.solve, _assign),
    )
    canvas.arrow(copy.bottom(), solve.top())
    x = 432
    canvas.text(x, top + 58, "Image 0, last layer", "strong")
    where = maps.image(maps.box(x, top + 66, 252), 0, faint=True)
    queries, objects = record.matches[0][-1][0]
    truth, found = record.batch.boxes_cxcywh[objects], record.predictions.boxes[0, queries]
    ends = (boxes[:, :2] * maps.valid[0] for boxes in (truth, found))
    for (x0, y0), (x1, y1) in zip(*(end.tolist() for end in ends), strict=True):
        canvas.raw(
            f'<path d="M{where.x + x0 * where.w:.1f},{where.y + y0 * where.h:.1f}L{where.x + x1 * where.w:.1f},'
            f'{where.y + y1 * where.h:.1f}" stroke="#24292f" stroke-width="1.4" stroke-dasharray="3 2"/>'
        )
    maps.boxes(where, 0, truth, TRUTH, 2.2)
    maps.boxes(where, 0, found, PREDICTED, 2)
    canvas.lines(
        x,
        where.y + where.h + 4,
        [
            quiet("green: objects; orange: their queries' boxes"),
            f"The other {record.config.model.queries - len(objects)} queries are nothing:",
            "they have the class loss alone.",
            "Every layer has its own matching, so a",
            "query may change its object on the way.",
        ],
    )
    return {"cost": cost, "solve": solve}


def _losses(canvas: Canvas, record: Record, top: float) -> tuple[Box, Box]:
    """Returns the frame that predictions and matches go to, and the table."""
    optim = record.config.optim
    canvas.zone(10, "Losses", "of every layer, and of the proposals", Box(728, top, 692, HEIGHT), "DETR §3.1, eq. 2")
    frame = canvas.box("layer", Box(744, top + 46, 660, 216))
    canvas.box(
        "compute",
        Box(754, top + 56, 312, 126),
        "Class: focal loss",
        [
            "of all queries as if nothing were there, while",
            "the costs travel; then what the matched change:",
            code(quote(criterion, "of_none + of_class")),
            quiet(f"alpha {optim.focal_alpha:g}, gamma {optim.focal_gamma:g}"),
        ],
        place(_focal),
        note="Lin et al., eq. 5",
    )
    canvas.box(
        "compute",
        Box(1076, top + 56, 318, 126),
        "Divided by the number of objects",
        [
            "of the whole step, on all ranks, at least one:",
            code(quote(criterion, "objects.clamp(min=1)")),
            "so ranks and micro-batches, however many, do",
            "not change the gradient",
        ],
        place(criterion),
    )
    canvas.box(
        "compute",
        Box(754, top + 192, 640, 60),
        "L1 and GIoU: of the matched boxes alone",
        [code(quote(_l1, 'F.l1_loss(pairs.boxes, pairs.targets, reduction="none").sum(-1)'))],
        place(paired_generalized_box_iou),
    )
    table = canvas.box(
        "data", Box(744, top + 284, 660, 124), "Weighted losses of this batch", place=place(Losses.weighted)
    )
    canvas.arrow(frame.bottom(0.2), table.top(0.2))
    weights = (optim.class_weight, optim.l1_weight, optim.giou_weight)
    values = record.losses.weighted(optim)
    for column, layer in enumerate(record.losses.layers):
        x = 920 + 62 * column + (24 if layer == "proposals" else 0)
        canvas.text(x, top + 320, f"layer {layer}" if layer.isdigit() else layer, "quiet", "middle")
        for row, value in enumerate(values[:, column].tolist()):
            canvas.text(x, top + 340 + 18 * row, f"{value:.3f}", "code", "middle")
    for row, (part, weight) in enumerate(zip(record.losses.parts, weights, strict=True)):
        canvas.text(753, top + 340 + 18 * row, f"{weight:g} x {part}", "strong")
    return frame, table


def _step(canvas: Canvas, record: Record, top: float) -> Box:
    config = record.config
    canvas.zone(11, "Backward and step", "DeepSpeed around the model", Box(1448, top, 652, HEIGHT), "§5")
    total = float(record.losses.weighted(config.optim).sum())
    loss = canvas.box(
        "compute",
        Box(1464, top + 46, 620, 82),
        f"Loss {total:.3f}: the sum of the table",
        [
            code(quote(train_step, "engine.run.backward(finite_or_poison(losses.weighted(config.optim).sum()))")),
            "a loss that is not finite makes gradients that are not numbers, on all ranks: no step",
        ],
        f"{place(train_step)}; {place(finite_or_poison)}",
    )
    clipped = canvas.box(
        "compute",
        Box(1464, top + 148, 620, 66),
        f"Gradients: mean over ranks, norm clipped at {config.optim.clip_norm:g}",
        [
            f"ZeRO stage {config.train.zero_stage}, {config.train.precision}: "
            "each rank keeps a part of the float32 weights and of AdamW's moments"
        ],
        [place(Engine.step, deepspeed_config)],
    )
    canvas.arrow(loss.bottom(), clipped.top())
    groups = parameter_groups(record.model, config.optim)
    adam = canvas.box(
        "compute",
        Box(1464, top + 234, 620, 120),
        "AdamW",
        [],
        place(parameter_groups),
        note=f"betas {config.optim.betas[0]:g}, {config.optim.betas[1]:g}; weight decay {config.optim.weight_decay:g}",
    )
    canvas.arrow(clipped.bottom(), adam.top())
    about = {"base": "all others", "backbone": "from C3's stage on", "sampling": ", ".join(SLOW)}
    for row, group in enumerate(groups):
        y = top + 276 + 20 * row
        count = sum(parameter.numel() for parameter in group["params"])
        canvas.text(1473, y, group["name"], "strong")
        canvas.text(1550, y, about[group["name"]], "quiet")
        canvas.text(1900, y, f"{millions(count)}", "code", "end")
        canvas.text(2074, y, f"learning rate {group['lr']:g}", "code", "end")
    drops = ", ".join(str(epoch) for epoch in config.optim.drop_epochs)
    canvas.lines(
        1464,
        top + 360,
        [
            f"The rate falls to a tenth after epoch {drops} of {config.train.epochs}; "
            f"a step has {config.train.batch_size} images on all ranks together.",
            quiet("Then the next batch. Checkpoint and evaluation come after an epoch: docs/how-it-works.md."),
        ],
    )
    return loss
