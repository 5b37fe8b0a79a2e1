"""Our detectors beside those of Hugging Face transformers, an independent implementation, with the same random weights.

Compared are every layer's outputs, the proposals, matching, losses, gradients and detections of Deformable DETR and
DETR, on whole and padded images of odd sizes. Both take the backbone from timm, so that is compared with torchvision's.

Shapes: N images, Q queries, D decoder layers, K logits of a query.
"""

import copy
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from ddetr.core.checkpoint.published import to_published
from ddetr.core.config import ModelConfig, OptimConfig
from ddetr.core.model.backbone import Backbone
from ddetr.core.model.criterion import criterion
from ddetr.core.model.detector import Detector, build
from ddetr.core.model.matcher import Matching, Stack
from ddetr.core.model.outputs import Predictions
from ddetr.core.model.postprocess import detections
from ddetr.data.batch import Batch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from tests.core.their_detectors import (
    their_detector,
    their_losses,
    their_matcher,
    their_names,
    their_predictions,
    without_classes,
)

pytestmark = pytest.mark.integration

DETR: dict[str, Any] = {"architecture": "detr", "levels": 1, "classification": "softmax"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "box_refine": {"box_refine": True},
    "two_stage": {"box_refine": True, "two_stage": True},
    "single_scale": {"levels": 1},
    "single_scale_dc5": {"levels": 1, "dilation": True},
    "detr": DETR,
    "detr_dc5": DETR | {"dilation": True},
}
IMAGES = {
    "223x317": [(223, 317)],
    "129x257": [(129, 257)],
    "64x203": [(64, 203)],
    "padded": [(129, 201), (97, 257)],  # one to the right, the other below
}
OBJECTS = {  # in each of the two images
    "objects": (3, 5),
    "one image without": (6, 0),
    "none": (0, 0),
    "more than queries": (26, 3),
}

# Their gradients are zero but for rounding: a key's bias moves all weights of a softmax alike, and DETR's first
# self-attention has zeros for values, so that nothing but its biases comes out, whatever the weights.
IDLE = {
    "deformable_detr": r"self_attn\.k_proj\.bias$",
    "detr": r"attn\.k_proj\.bias$|decoder\.layers\.0\.self_attn\.(([qk]_proj\.)|v_proj\.weight)",
}


class Pair(NamedTuple):
    """The same detector twice."""

    ours: Detector
    theirs: Any


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    # Not importorskip: a transformers that is there and does not import is an error.
    if find_spec("transformers") is None:
        pytest.skip("transformers is absent: pip install -c constraints.txt transformers")
    return import_module("transformers")


@pytest.fixture(scope="module")
def pair(transformers: ModuleType) -> Callable[[str], Pair]:
    """A variant's two detectors, in eval mode, without dropout."""

    @cache
    def make(variant: str) -> Pair:
        config = _configuration(variant)
        ours, theirs = build(config), their_detector(transformers, config)
        _randomise(ours)
        # They freeze the stem and the first stage, as published, but only of a backbone that is not timm's.
        for name, parameter in theirs.model.backbone.named_parameters():
            parameter.requires_grad_(re.search(r"layer[234]\.", name) is not None)
        # Strict: it raises when a name is missing or left over.
        theirs.load_state_dict(their_names(to_published(ours), config))
        return Pair(ours.eval(), theirs.eval())

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_has_its_counterpart(variant: str, pair: Callable[[str], Pair]) -> None:
    ours, theirs = pair(variant)
    published = to_published(ours)
    assert {tensor.data_ptr() for tensor in ours.state_dict().values()} == {
        tensor.data_ptr() for tensor in published.values()
    }
    expected = their_names(published, ours.config)
    held = theirs.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name]), name
    assert _count(ours) == _count(theirs)  # and weights that are shared here are shared there


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_agree(variant: str, size: str, pair: Callable[[str], Pair]) -> None:
    ours, theirs = pair(variant)
    images, padding_mask = _images(size)
    with torch.no_grad():
        predictions = ours(images, padding_mask)
        expected = their_predictions(theirs, images, padding_mask)
    assert (predictions.proposals is None) == (expected.proposals is None) == (variant != "two_stage")
    assert len(predictions.aux) == len(expected.aux) == ours.config.decoder_layers - 1
    assert predictions.logits.std(1).min() > 0.05  # queries differ
    assert predictions.boxes.std(1).min() > 0.005
    if expected.proposals is not None:  # the queries agree only where rounding cannot change which proposals are best
        best = expected.proposals[0][..., 0].topk(ours.config.queries + 1).values
        assert (best[:, :-1] - best[:, 1:]).min() > 1e-4
    for (logits, boxes), (expected_logits, expected_boxes) in zip(
        _outputs(predictions), _outputs(expected), strict=True
    ):
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(boxes, expected_boxes, rtol=0, atol=3e-6)


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("variant", ["plain", "two_stage", "detr"])
def test_matching_and_losses_agree(variant: str, objects: str, pair: Callable[[str], Pair]) -> None:
    ours, theirs = pair(variant)
    batch, labels = _batch(objects)
    with torch.no_grad():
        predictions = ours(*_images("padded"))
    config = _optimisation(ours)

    matched = batch.num_boxes.clamp(max=ours.config.queries).sum()
    losses = criterion(predictions, batch, config, len(batch.labels), num_matched=matched)
    values, cardinality = their_losses(theirs, predictions, labels)
    torch.testing.assert_close(losses.values, values, rtol=1e-5, atol=1e-6)
    if predictions.softmax:  # their Deformable DETR counts probabilities above one half, the published one best classes
        torch.testing.assert_close(losses.cardinality_error, cardinality)

    matcher = their_matcher(theirs)
    for index, (logits, boxes) in enumerate(_outputs(predictions)):
        classless = predictions.proposals is not None and index == len(predictions.aux) + 1
        stack = Stack(logits[None], boxes[None], batch.labels * (not classless))
        matching = Matching([stack], batch.boxes_cxcywh, batch.num_boxes.tolist(), config, predictions.softmax)
        expected = matcher({"logits": logits, "pred_boxes": boxes}, without_classes(labels) if classless else labels)
        for (queries, matched), (their_queries, their_matched) in zip(matching.solve()[0][0], expected, strict=True):
            assert queries.tolist() == their_queries.tolist()
            assert matched.tolist() == their_matched.tolist()


@pytest.mark.parametrize("variant", ["plain", "box_refine", "two_stage", "detr", "detr_dc5"])
def test_gradients_agree(variant: str, pair: Callable[[str], Pair]) -> None:
    ours, theirs = pair(variant)
    batch, labels = _batch("objects")
    config = _optimisation(ours)
    images = _images("padded")
    ours.zero_grad()
    theirs.zero_grad()
    losses = criterion(ours(*images), batch, config, len(batch.labels))
    total = losses.weighted(config).sum()
    total.backward()
    values, _ = their_losses(theirs, their_predictions(theirs, *images), labels)
    weights = torch.tensor([config.class_weight, config.l1_weight, config.giou_weight])
    their_total = (values * weights[:, None]).sum()
    their_total.backward()
    torch.testing.assert_close(total, their_total, rtol=1e-5, atol=0)

    gradients = _gradients_by_their_names(ours)
    for name, parameter in theirs.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if parameter.grad is None:
            assert gradients[name].isnan().all(), name
            continue
        difference, norm = (gradients[name] - parameter.grad).norm(), parameter.grad.norm()
        if re.search(IDLE[ours.config.architecture], name):
            assert max(norm, gradients[name].norm()) < 1e-5, name
            continue
        assert norm > 1e-3, name
        assert difference <= 1e-4 * norm, (name, difference / norm)


@pytest.mark.parametrize("top_k", [7, 200])
@pytest.mark.parametrize("variant", ["box_refine", "detr"])
def test_detections_agree(variant: str, top_k: int, pair: Callable[[str], Pair], transformers: ModuleType) -> None:
    ours, _ = pair(variant)
    with torch.no_grad():
        predictions = ours(*_images("padded"))
    sizes = torch.tensor([(480, 640), (375, 500)])
    outputs = SimpleNamespace(logits=predictions.logits, pred_boxes=predictions.boxes)
    if predictions.softmax:  # they report all queries, in the queries' order
        expected = transformers.DetrImageProcessor().post_process_object_detection(outputs, 0.0, sizes)
        best = [image["scores"].argsort(descending=True)[:top_k] for image in expected]
        expected = [{k: v[order] for k, v in image.items()} for image, order in zip(expected, best, strict=True)]
    else:
        processor = transformers.DeformableDetrImageProcessor()
        expected = processor.post_process_object_detection(outputs, 0.0, sizes, top_k)
    for found, image in zip(detections(predictions, sizes, top_k), expected, strict=True):
        assert len(found.scores) == min(top_k, ours.config.queries * (1 if predictions.softmax else 5))
        torch.testing.assert_close(found.scores, image["scores"], rtol=0, atol=1e-6)
        assert found.labels.tolist() == image["labels"].tolist()
        torch.testing.assert_close(found.boxes_xyxy, image["boxes"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dilation", [False, True], ids=["plain", "dc5"])
def test_backbone_agrees_with_torchvision(dilation: bool) -> None:
    """What the published code takes C3 to C5 from."""
    levels = 1 if dilation else 4
    ours = Backbone(ModelConfig(pretrained_backbone=False, dilation=dilation, levels=levels)).eval()
    _randomise(ours)
    theirs = torchvision.models.resnet50(
        norm_layer=torchvision.ops.FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, dilation]
    )
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.body.state_dict())
    layers = ["layer4"] if dilation else ["layer2", "layer3", "layer4"]
    images, _ = _images("padded")
    with torch.no_grad():
        features = ours(images)
        expected = list(create_feature_extractor(theirs, layers)(images).values())
    assert ours.strides == ((16,) if dilation else (8, 16, 32))
    assert len(features) == len(expected)
    for feature, expected_feature in zip(features, expected, strict=True):
        assert feature.std() > 0.1
        torch.testing.assert_close(feature, expected_feature, rtol=1e-4, atol=1e-5)


def _configuration(variant: str) -> ModelConfig:
    settings: dict[str, Any] = {
        "backbone": "resnet18.tv_in1k", "pretrained_backbone": False, "hidden_dim": 64, "heads": 4,
        "encoder_layers": 2, "decoder_layers": 3, "feedforward_dim": 128, "queries": 20, "dropout": 0.0,
        "num_classes": 5,
    }  # fmt: skip
    return ModelConfig.model_validate(settings | VARIANTS[variant])


def _optimisation(ours: Detector) -> OptimConfig:
    """The published weights of the losses, and of the same parts in the matching."""
    return OptimConfig(class_weight=1.0 if ours.config.architecture == "detr" else 2.0)


def _randomise(model: nn.Module) -> None:
    """Random numbers everywhere, also in statistics of frozen norms and in what is zero at first."""
    generator = torch.Generator().manual_seed(9 if any("pos_trans" in name for name in model.state_dict()) else 7)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            value = 0.5 + noise.square()
        elif name.endswith(("query_embed.weight", "level_embed.weight", "sampling_offsets.bias")):
            value = noise
        elif tensor.dim() > 1:
            # Large for attention to tokens: its weights are far from equal then, and queries see different things.
            gain = 9.0 if "multihead_attn" in name else 1.0
            value = noise * (gain / tensor[0].numel()) ** 0.5
        elif name.endswith("weight"):  # of a norm
            value = 1 + 0.2 * noise
        else:
            value = 0.2 * noise
        tensor.copy_(value)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _images(size: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), zero on padding, and padding_mask (N, H, W)."""
    generator = torch.Generator().manual_seed(11)
    height, width = (max(side) for side in zip(*IMAGES[size], strict=True))
    images = torch.zeros(len(IMAGES[size]), 3, height, width)
    padding_mask = torch.ones(len(IMAGES[size]), height, width, dtype=torch.bool)
    for image, mask, (h, w) in zip(images, padding_mask, IMAGES[size], strict=True):
        coarse = 3 * torch.randn(1, 3, 5, 7, generator=generator)  # noise on each pixel alone looks alike everywhere
        image[:, :h, :w] = F.interpolate(coarse, (h, w), mode="bilinear")[0] + torch.randn(3, h, w, generator=generator)
        mask[:h, :w] = False
    return images, padding_mask


def _batch(objects: str) -> tuple[Batch, list[dict[str, Tensor]]]:
    """Objects of the two padded images, as we and as they take them."""
    generator = torch.Generator().manual_seed(13)
    labels = []
    for number in OBJECTS[objects]:
        boxes = 0.25 + 0.5 * torch.rand(number, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.8, 0.8])
        boxes[:, 2:] -= 0.2
        labels.append({"class_labels": torch.randint(5, (number,), generator=generator), "boxes": boxes})
    images, _ = _images("padded")
    batch = Batch(
        images=images,
        sizes=torch.tensor(IMAGES["padded"]),
        boxes_cxcywh=torch.cat([image["boxes"] for image in labels]),
        labels=torch.cat([image["class_labels"] for image in labels]),
        num_boxes=torch.tensor(OBJECTS[objects]),
        image_ids=torch.arange(2),
        original_sizes=torch.tensor(IMAGES["padded"]),
        is_real=torch.ones(2, dtype=torch.bool),
    )
    return batch, labels


def _outputs(predictions: Predictions) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes of every layer, first to last, then the proposals."""
    layers = [*predictions.aux, (predictions.logits, predictions.boxes)]
    return layers if predictions.proposals is None else [*layers, predictions.proposals]


def _gradients_by_their_names(ours: Detector) -> dict[str, Tensor]:
    """Gradients in the place of weights; not a number where a parameter has none."""
    gradients = copy.deepcopy(ours)
    for gradient, parameter in zip(gradients.parameters(), ours.parameters(), strict=True):
        gradient.data = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
    return their_names(to_published(gradients), ours.config)
