"""Matching and losses against plain loops, where the reference outputs do not reach."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from ddetr.core.config import OptimConfig
from ddetr.core.model.criterion import criterion
from ddetr.core.model.matcher import Matches, Matching, Stack
from ddetr.core.model.outputs import Output, Predictions
from ddetr.data.batch import Batch
from ddetr.data.boxes import cxcywh_to_xyxy
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

CONFIG = OptimConfig(class_weight=1.5, l1_weight=4.0, giou_weight=3.0, focal_alpha=0.3, focal_gamma=1.5)
QUERIES, CLASSES = 5, 4


def random_boxes(*shape: int) -> torch.Tensor:
    sizes = 0.05 + 0.4 * torch.rand(*shape, 2)
    return torch.cat([sizes / 2 + torch.rand(*shape, 2) * (1 - sizes), sizes], dim=-1)


def random_batch(counts: list[int]) -> Batch:
    total = sum(counts)
    return Batch(
        images=torch.empty(0),
        sizes=torch.empty(0),
        boxes_cxcywh=random_boxes(total),
        labels=torch.randint(CLASSES, (total,)),
        num_boxes=torch.tensor(counts),
        image_ids=torch.arange(len(counts)),
        original_sizes=torch.ones(len(counts), 2, dtype=torch.int64),
        is_real=torch.ones(len(counts), dtype=torch.bool),
    )


def match(logits: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, batch: Batch) -> Matches:
    stack = Stack(logits, boxes, labels)
    (matches,) = Matching([stack], batch.boxes_cxcywh, batch.num_boxes.tolist(), CONFIG, softmax=False).solve()
    return matches


def pair_cost(logits: torch.Tensor, box: torch.Tensor, label: int, target: torch.Tensor) -> float:
    p = logits.sigmoid()[label]
    found = -CONFIG.focal_alpha * (1 - p) ** CONFIG.focal_gamma * (p + 1e-8).log()
    missed = -(1 - CONFIG.focal_alpha) * p**CONFIG.focal_gamma * (1 - p + 1e-8).log()
    giou = generalized_box_iou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(target[None]))[0, 0]
    l1 = (box - target).abs().sum()
    return float(CONFIG.class_weight * (found - missed) + CONFIG.l1_weight * l1 - CONFIG.giou_weight * giou)


@pytest.mark.parametrize("counts", [[3, 0, 2], [1], [0, 5]])
def test_matching_is_the_cheapest_of_all_assignments(counts: list[int]) -> None:
    torch.manual_seed(sum(counts))
    layers, images = 2, len(counts)
    logits, boxes = torch.randn(layers, images, QUERIES, CLASSES), random_boxes(layers, images, QUERIES)
    batch = random_batch(counts)
    matches = match(logits, boxes, batch.labels, batch)
    starts = [sum(counts[:n]) for n in range(images)]
    for layer, n in itertools.product(range(layers), range(images)):
        queries, found = matches[layer][n]
        assert sorted(found.tolist()) == list(range(counts[n]))
        assert len(set(queries.tolist())) == counts[n]

        def cost(chosen: tuple[int, ...], layer: int = layer, n: int = n) -> float:
            rows = range(starts[n], starts[n] + counts[n])
            return sum(
                pair_cost(logits[layer, n, q], boxes[layer, n, q], int(batch.labels[row]), batch.boxes_cxcywh[row])
                for q, row in zip(chosen, rows, strict=True)
            )

        ours = tuple(queries[found.argsort()].tolist())
        best = min(itertools.permutations(range(QUERIES), counts[n]), key=cost)
        assert cost(ours) == pytest.approx(cost(best), abs=1e-5)


def test_more_objects_than_queries_matches_every_query() -> None:
    batch = random_batch([QUERIES + 3])
    logits, boxes = torch.randn(1, 1, QUERIES, CLASSES), random_boxes(1, 1, QUERIES)
    ((queries, found),) = match(logits, boxes, batch.labels, batch)[0]
    assert sorted(queries.tolist()) == list(range(QUERIES))
    assert len(set(found.tolist())) == QUERIES
    predictions = Predictions.of([(logits[0], boxes[0])])
    assert criterion(predictions, batch, CONFIG, 1.0).values.isfinite().all()


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0]])
def test_losses_equal_a_loop_over_images(counts: list[int]) -> None:
    torch.manual_seed(1)
    images = len(counts)
    outputs = [(torch.randn(images, QUERIES, CLASSES), random_boxes(images, QUERIES)) for _ in range(3)]
    proposals = (torch.randn(images, 11, CLASSES), random_boxes(images, 11))
    batch = random_batch(counts)
    predictions = Predictions.of(outputs, proposals)
    losses = criterion(predictions, batch, CONFIG, 2.5)
    assert losses.layers == ("0", "1", "2", "proposals")
    for column, (logits, boxes) in enumerate([*outputs, proposals]):
        labels = batch.labels if column < 3 else torch.zeros_like(batch.labels)
        matches = match(logits[None], boxes[None], labels, batch)[0]
        wanted = torch.zeros_like(logits)
        l1 = giou = 0.0
        start = 0
        for n, (queries, found) in enumerate(matches):
            for query, row in zip(queries.tolist(), (found + start).tolist(), strict=True):
                wanted[n, query, labels[row]] = 1
                box, target = boxes[n, query], batch.boxes_cxcywh[row]
                l1 += float((box - target).abs().sum())
                giou += 1 - float(generalized_box_iou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(target[None])))
            start += counts[n]
        focal = float(sigmoid_focal_loss(logits, wanted, CONFIG.focal_alpha, CONFIG.focal_gamma, reduction="sum"))
        expected = [focal / 2.5, l1 / 2.5, giou / 2.5]
        assert losses.values[:, column].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def one_image(batch: Batch, image: int) -> Batch:
    start, count = int(batch.num_boxes[:image].sum()), int(batch.num_boxes[image])
    of_images = ("images", "sizes", "num_boxes", "image_ids", "original_sizes", "is_real")
    rows = {name: getattr(batch, name)[start : start + count] for name in ("boxes_cxcywh", "labels")}
    return replace(batch, **rows, **{name: getattr(batch, name)[image : image + 1] for name in of_images})


def of_image(output: Output, layer: tuple[torch.Tensor, torch.Tensor], image: int) -> Predictions:
    assert output.matches is not None
    one = slice(image, image + 1)
    alone = replace(output, logits=output.logits[one], boxes=output.boxes[one], matches=list(output.matches)[one])
    return Predictions(Predictions.of([(layer[0][one], layer[1][one])]).decoder, (alone,))


def test_known_matches_are_taken_as_they_are() -> None:
    """Outputs of one shape, one of them matched beforehand: as denoising queries are."""
    torch.manual_seed(3)
    batch = random_batch([3, 0, 2])
    layers = [(torch.randn(3, QUERIES, CLASSES), random_boxes(3, QUERIES)) for _ in range(2)]
    plain = criterion(Predictions.of(layers), batch, CONFIG, 5.0)
    found = match(*(part[None] for part in layers[1]), batch.labels, batch)[0]
    known = Output("known", *layers[1], matches=found)
    losses = criterion(Predictions(Predictions.of(layers).decoder, (known,)), batch, CONFIG, 5.0)
    assert losses.layers == ("0", "1", "known")
    torch.testing.assert_close(losses.values[:, 2], losses.values[:, 1])
    torch.testing.assert_close(losses.values[:, :2], plain.values)
    assert losses.class_error == plain.class_error

    other = [(queries[::-1].copy(), objects) for queries, objects in found]  # no best assignment any more
    losses = criterion(
        Predictions(Predictions.of(layers).decoder, (replace(known, matches=other),)), batch, CONFIG, 5.0
    )
    assert losses.values[1, 2] > losses.values[1, 1]

    # Twice as many queries, each object matched in both halves: the mean of two equal halves.
    twice = [(np.concatenate([queries, queries + QUERIES]), np.tile(objects, 2)) for queries, objects in found]
    logits, boxes = (torch.cat([part, part], dim=1) for part in layers[1])
    doubled = Output("doubled", logits, boxes, matches=twice, repeats=2)
    losses = criterion(Predictions(Predictions.of(layers).decoder, (doubled,)), batch, CONFIG, 5.0)
    torch.testing.assert_close(losses.values[:, 2], losses.values[:, 1])

    # And image by image, as ranks divide them: the mean of the shares is the whole.
    shares = []
    for image in range(3):
        alone = criterion(of_image(doubled, layers[1], image), one_image(batch, image), CONFIG, 5.0, num_shares=3)
        shares.append(alone.values)
    torch.testing.assert_close(torch.stack(shares).mean(0)[:, -1], losses.values[:, 2])


def test_without_objects_every_parameter_still_gets_a_gradient() -> None:
    logits = torch.randn(2, QUERIES, CLASSES, requires_grad=True)
    boxes = random_boxes(2, QUERIES).requires_grad_()
    criterion(Predictions.of([(logits, boxes)]), random_batch([0, 0]), CONFIG, 1.0).values.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert boxes.grad is not None
    assert boxes.grad.abs().sum() == 0


def test_a_prediction_that_is_not_a_number_shows_in_the_loss() -> None:
    logits, boxes = torch.randn(1, QUERIES, CLASSES), random_boxes(1, QUERIES)
    logits[0, 2, 1] = float("nan")
    assert not criterion(Predictions.of([(logits, boxes)]), random_batch([2]), CONFIG, 1.0).values[0].isfinite().all()
