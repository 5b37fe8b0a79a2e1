"""Parameters and multiply-adds: the published table, and formulas written down by hand.

Shapes: S tokens, Q queries, C hidden_dim, F feedforward_dim, H heads, L levels, P points.
"""

import json
from pathlib import Path

import pytest
import torch
from ddetr.core.config import ModelConfig, load
from ddetr.core.model.cost import IMAGE_SIZE, Cost, costs
from ddetr.core.model.detector import build
from ddetr.data.config import DataConfig
from ddetr.data.views import evaluation_view
from ddetr.ops.library import UNAVAILABLE

# Millions of parameters and GFLOPs, rounded as published: table 1, in the published code's README with its
# single-scale rows. Parameters are those that train (the published code prints these); all heads have 91 classes.
PUBLISHED = {
    "detr_r50": (41, 86),
    "detr_r50_dc5": (41, 187),
    "detr_r50_dc5_plus": (41, 187),
    "r50_single_scale": (34, 78),
    "r50_single_scale_dc5": (34, 128),
    "r50": (40, 173),
    "r50_refine": (41, 173),
    "r50_two_stage": (41, 173),
}


def total(config: ModelConfig) -> Cost:
    return sum(costs(config).values(), Cost(0, 0, 0))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_table(preset: str) -> None:
    parameters, gflops = PUBLISHED[preset]
    cost = total(load(preset, ["model.num_classes=91"]).model)
    assert cost.num_trained / 1e6 == pytest.approx(parameters, rel=0.01)
    assert cost.num_multiply_adds / 1e9 == pytest.approx(gflops, rel=0.05)


def test_the_image_is_as_large_as_those_of_coco(coco_free: Path) -> None:
    """All rows of the table are counted at one size, which has as many pixels as the mean of real images."""
    images = json.loads((coco_free / "annotations.json").read_text())["images"]
    sizes = [evaluation_view(image["height"], image["width"], DataConfig()).size for image in images]
    mean_pixels = sum(height * width for height, width in sizes) / len(sizes)
    assert IMAGE_SIZE[0] * IMAGE_SIZE[1] == pytest.approx(mean_pixels, rel=0.01)


@pytest.mark.parametrize("preset", ["detr_r50", "r50", "r50_two_stage"])
def test_every_parameter_is_in_its_part(preset: str) -> None:
    config = load(preset, ["model.pretrained_backbone=false"]).model
    with torch.device("meta"):
        model = build(config)

    def under(*prefixes: str) -> int:
        return sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefixes))

    expected = {
        "backbone": under("backbone."),
        "feature projections": under("input_proj."),
        "encoder": under("transformer.encoder.", "transformer.level_embed."),
        "first stage": under("transformer.enc_output", "transformer.pos_trans", "class_embed.6.", "bbox_embed.6."),
        "decoder": under("transformer.decoder.", "transformer.reference_points.", "query_embed."),
        "class heads": under("class_embed.") - under("class_embed.6."),
        "box heads": under("bbox_embed.") - under("bbox_embed.6."),
    }
    if not config.two_stage:
        assert expected.pop("first stage") == 0
    parts = costs(config)
    assert {part: cost.num_trained + cost.num_frozen for part, cost in parts.items()} == expected
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(cost.num_trained for cost in parts.values()) == trained
    assert sum(expected.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_frozen_parameters_are_the_stem_and_the_first_stage() -> None:
    """ResNet-50's first convolution (7 x 7, 3 to 64) and its three first blocks; norms are buffers."""
    blocks = [(64, 64), (256, 64), (256, 64)]
    convolutions = sum(before * width + 9 * width * width + width * 256 for before, width in blocks) + 64 * 256
    frozen = {part: cost.num_frozen for part, cost in costs(load("r50").model).items() if cost.num_frozen}
    assert frozen == {"backbone": 49 * 3 * 64 + convolutions}


def test_resnet_50_has_its_well_known_count() -> None:
    """4.09 G multiply-adds at 224 x 224, of which the classifier, 2048 x 1000, is not part of a detector."""
    backbone = costs(load("r50").model, (224, 224))["backbone"]
    assert backbone.num_multiply_adds + 2048 * 1000 == pytest.approx(4.09e9, abs=0.005e9)


def test_detr_against_a_hand_computation() -> None:
    """A product of (m, k) and (k, n) has m k n multiply-adds. Odd sizes, so that no two terms agree by chance."""
    config = load("detr_r50", ["model.queries=77", "model.feedforward_dim=1000"]).model
    c, f, q, s = 256, 1000, 77, 20 * 27
    self_attention = 4 * c * c * s + 2 * s * s * c  # query, key, value and output; logits and weighted sum
    encoder_layer = self_attention + 2 * c * f * s
    cross_attention = 2 * c * c * q + 2 * c * c * s + 2 * q * s * c
    decoder_layer = 4 * c * c * q + 2 * q * q * c + cross_attention + 2 * c * f * q
    parts = costs(config, (640, 864))
    assert parts["encoder"].num_multiply_adds == 6 * encoder_layer
    assert parts["decoder"].num_multiply_adds == 6 * decoder_layer
    assert parts["feature projections"].num_multiply_adds == 2048 * c * s
    assert parts["class heads"].num_multiply_adds == 6 * q * c * 81
    assert parts["box heads"].num_multiply_adds == 6 * q * (2 * c * c + 4 * c)


@pytest.mark.parametrize("two_stage", [False, True])
def test_deformable_detr_against_a_hand_computation(two_stage: bool) -> None:
    overrides = ["model.queries=77", "model.feedforward_dim=1000", "model.points=3", "model.box_refine=true"]
    config = load("r50", [*overrides, f"model.two_stage={two_stage}"]).model
    c, f, q, h, l, p = 256, 1000, 77, 8, 4, 3
    maps = [80 * 108, 40 * 54, 20 * 27, 10 * 14]
    s = sum(maps)

    def deformable_attention(queries: int) -> int:
        """Offsets and weights of each point, sampling (section A.1's 5 N_q K C), output; values of all tokens."""
        return queries * (c * h * l * p * 3 + 5 * l * p * c + c * c) + s * c * c

    encoder_layer = deformable_attention(s) + 2 * c * f * s
    decoder_layer = 4 * c * c * q + 2 * q * q * c + deformable_attention(q) + 2 * c * f * q
    box_head = 2 * c * c + 4 * c
    parts = costs(config, (640, 864))
    assert parts["encoder"].num_multiply_adds == 6 * encoder_layer
    assert parts["decoder"].num_multiply_adds == 6 * decoder_layer + (0 if two_stage else q * c * 2)
    channels = (512, 1024, 2048, 2048 * 9)  # of C3, C4 and C5, and of C5 under the 3 x 3 convolution to C6
    projections = sum(tokens * before * c for tokens, before in zip(maps, channels, strict=True))
    assert parts["feature projections"].num_multiply_adds == projections
    assert parts["class heads"].num_multiply_adds == 6 * q * c * 80
    assert parts["box heads"].num_multiply_adds == 6 * q * box_head
    if two_stage:
        assert parts["first stage"].num_multiply_adds == s * (c * c + c * 80 + box_head) + q * 4 * c * c


@pytest.mark.parametrize("image_size", [(0, 640), (480, -1)])
def test_an_image_without_pixels_is_refused(image_size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="image_size"):
        costs(load("tiny").model, image_size)


def test_without_the_op_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UNAVAILABLE, "cpu", "it was not built")
    with pytest.raises(OSError, match="the attention op cannot be counted: it was not built"):
        costs(load("tiny").model, (64, 64))
