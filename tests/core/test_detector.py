"""The detector as built, before any training. What it computes is compared with the reference in test_golden.py."""

import pytest
import torch
from ddetr.core.config import ModelConfig
from ddetr.core.model.detector import DeformableDetr


def small(**changes: object) -> DeformableDetr:
    torch.manual_seed(0)
    settings = {
        "backbone": "test_resnet.r160_in1k", "pretrained_backbone": False, "backbone_norm": "group", "hidden_dim": 64,
        "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 64, "queries": 12, "num_classes": 3,
        "box_refine": True, "two_stage": True,
    }  # fmt: skip
    return DeformableDetr(ModelConfig.model_validate(settings | changes))


@pytest.mark.parametrize("size", [0.05, 0.12])
def test_the_first_stage_starts_from_squares_centred_on_the_tokens(size: float) -> None:
    """An image of 96 x 160 pixels padded to 128 x 192; the box head moves nothing yet."""
    padding_mask = torch.ones(1, 128, 192, dtype=torch.bool)
    padding_mask[:, :96, :160] = False
    with torch.no_grad():
        proposals = small(proposal_size=size)(torch.randn(1, 3, 128, 192), padding_mask).proposals
    assert proposals is not None
    expected = []
    for level, stride in enumerate((8, 16, 32, 64)):
        rows, columns = -(-96 // stride), -(-160 // stride)  # that the image fills, a part of a token counting whole
        for y in range(128 // stride):
            for x in range(192 // stride):
                centre, side = ((x + 0.5) / columns, (y + 0.5) / rows), size * 2**level
                inside = x < columns and y < rows and min(*centre, side) > 0.01 and max(*centre, side) < 0.99
                expected.append([*centre, side, side] if inside else [1.0] * 4)
    torch.testing.assert_close(proposals[1][0], torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"two_stage": False}, {"two_stage": False, "box_refine": False}])
def test_every_parameter_is_trained(changes: dict) -> None:
    model = small(**changes)
    with torch.no_grad():  # heads that start at zero would stop the gradients of what is below them
        for name, parameter in model.named_parameters():
            if name.startswith("bbox_embed") or "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    predictions = model(torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool))
    outputs = [predictions.logits, predictions.boxes, *(part for layer in predictions.aux for part in layer)]
    for part in predictions.proposals or ():
        outputs.append(part[part.isfinite()])
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()  # pyright: ignore
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []


def test_without_multi_scale_attention_a_token_sees_its_own_level_alone() -> None:
    """Table 2 of the paper: the encoder's layer gives what it gives for each level by itself."""
    model = small(multi_scale_attention=False, points=2).eval()
    layer, shapes = model.transformer.encoder.layers[0], [(5, 6), (3, 3), (2, 2), (1, 1)]
    torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.2)
    tokens, position = torch.randn(2, 2, sum(height * width for height, width in shapes), 64)
    points = torch.rand(2, tokens.shape[1], 4, 2)
    padding_mask = torch.rand(2, tokens.shape[1]) < 0.1
    found = layer(tokens, position, points, shapes, padding_mask)
    begin = 0
    for level, (height, width) in enumerate(shapes):
        own = slice(begin, begin := begin + height * width)
        arguments = tokens[:, own], position[:, own], points[:, own, level : level + 1], [(height, width)]
        torch.testing.assert_close(found[:, own], layer(*arguments, padding_mask[:, own]))
