"""The replacements that docs/op.md shows, taken out of that page and run beside what they replace in transformers.

Shapes: N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/op.md"
HEADING = "\n## In place of other implementations\n"
SHAPES = [(6, 7), (3, 4), (2, 1)]
START_INDEX = torch.tensor([0, 42, 54])

# Both sides add the same terms, in another order; a gradient of a location adds terms of about a hundred.
OPERATOR_BOUNDS = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-4}}
MODEL_BOUNDS = {"rtol": 1e-10, "atol": 1e-11}  # float64, through all layers

VARIANTS = {
    "plain": {},
    "box-refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
}
LAYERS = 2  # of the encoder, and as many of the decoder


@pytest.fixture
def transformers() -> ModuleType:
    # Not importorskip: a transformers that is there and does not import is an error.
    if find_spec("transformers") is None:
        pytest.skip("transformers is absent: pip install -c constraints.txt transformers")
    return import_module("transformers")


@pytest.fixture
def modeling(transformers: ModuleType) -> ModuleType:
    from transformers.models.deformable_detr import modeling_deformable_detr

    return modeling_deformable_detr


@pytest.fixture
def published_core() -> type:
    return _execute(_block("class MSDeformAttnFunction"))["MSDeformAttnFunction"]


@pytest.fixture
def build(transformers: ModuleType, modeling: ModuleType) -> Callable[..., nn.Module]:
    """A small detector in float64, with random weights all over the transformer unless it is to be fresh.

    As transformers initialises it, all queries have the same offsets and weights, and points of the encoder lie on
    pixel centres, where the gradient of a location jumps and two right answers may differ.
    """

    def make(variant: str, *, fresh: bool = False) -> nn.Module:
        torch.manual_seed(3)
        config = transformers.DeformableDetrConfig(
            backbone="test_resnet",  # the smallest one of timm
            use_pretrained_backbone=False,
            d_model=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=20,
            two_stage_num_proposals=20,
            num_labels=5,
            dropout=0.0,
            auxiliary_loss=True,
            attn_implementation="eager",  # what `output_attentions` needs in the decoder's ordinary attention
            **VARIANTS[variant],
        )
        model = modeling.DeformableDetrForObjectDetection(config).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not (fresh or name.startswith("model.backbone")):
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Two images, the second one padded below and on the right, and their objects."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 70:] = 0
    mask[1, :, 101:] = 0
    boxes = torch.rand(2, 3, 4, dtype=torch.float64, generator=generator) * 0.3 + 0.2
    return {
        "pixel_values": torch.randn(2, 3, 96, 128, dtype=torch.float64, generator=generator) * mask[:, None],
        "pixel_mask": mask,
        "labels": [{"class_labels": torch.tensor([0, 4, 2]), "boxes": image_boxes} for image_boxes in boxes],
    }


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_published_signature_agrees_with_transformers(
    dtype: torch.dtype,
    as_list: bool,
    published_core: type,
    modeling: ModuleType,
    plain_arguments: Callable[..., list[Tensor]],
) -> None:
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    shapes = torch.tensor(SHAPES)
    module = modeling.MultiScaleDeformableAttention()
    # A batch of 3 in steps of 2: the published kernel refuses it, this operator has no steps.
    arguments = plain_arguments(dtype, batch=3, heads=4, channels=32)
    gradient = torch.randn(3, 11, 128, dtype=dtype, generator=torch.Generator().manual_seed(8))
    results = []
    for core in (
        lambda value, *points: multi_scale_deformable_attention(value, shapes, *points),
        lambda value, *points: module(value, shapes, SHAPES, START_INDEX, *points, 2),
        lambda value, *points: published_core.apply(value, SHAPES if as_list else shapes, START_INDEX, *points, 2),
    ):
        leaves = [argument.clone().requires_grad_() for argument in arguments]
        output = core(*leaves)
        output.backward(gradient)
        assert all(leaf.grad.any() for leaf in leaves)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for expected in results[:2]:
        torch.testing.assert_close(results[2], expected, **OPERATOR_BOUNDS[dtype])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_trains_the_same(
    variant: str,
    padded: bool,
    build: Callable[..., nn.Module],
    modeling: ModuleType,
    inputs: dict[str, Any],
) -> None:
    model = build(variant).train()
    if not padded:
        del inputs["pixel_mask"]
    own, own_gradients = _step(model, inputs)
    with _replaced(modeling) as calls:
        outputs, gradients = _step(model, inputs)
    assert len(calls) == 2 * LAYERS
    _assert_same(outputs, own)
    torch.testing.assert_close(gradients, own_gradients, **MODEL_BOUNDS)
    # They say something about the attention only where they are not zero.
    for projection in ("sampling_offsets", "attention_weights", "value_proj"):
        reached = [name for name, gradient in gradients.items() if f"{projection}.weight" in name and gradient.any()]
        assert len(reached) == 2 * LAYERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_detects_the_same(
    variant: str, build: Callable[..., nn.Module], modeling: ModuleType, inputs: dict[str, Any]
) -> None:
    model = build(variant).eval()
    with torch.no_grad():
        own = model(**inputs, output_attentions=True)
        with _replaced(modeling) as calls:
            outputs = model(**inputs, output_attentions=True)
    assert len(calls) == 2 * LAYERS
    assert len(outputs.encoder_attentions) == len(outputs.cross_attentions) == LAYERS
    _assert_same(outputs, own)


def test_shapes_reach_the_operator_as_integers(
    build: Callable[..., nn.Module], modeling: ModuleType, inputs: dict[str, Any]
) -> None:
    """transformers hands out the list, so that no tensor must be read from the GPU."""
    with _replaced(modeling) as calls:
        build("plain")(**inputs)
    assert calls == [[(12, 16), (6, 8), (3, 4), (2, 2)]] * (2 * LAYERS)
    assert all(type(side) is int for shapes in calls for shape in shapes for side in shape)


def test_a_fresh_model_differs_in_the_gradient_of_offsets_alone(
    build: Callable[..., nn.Module], modeling: ModuleType, inputs: dict[str, Any]
) -> None:
    model = build("plain", fresh=True).train()
    own, own_gradients = _step(model, inputs)
    with _replaced(modeling):
        outputs, gradients = _step(model, inputs)
    _assert_same(outputs, own)
    others = {name for name in gradients if "encoder.layers" not in name or "sampling_offsets" not in name}
    assert len(others) == len(gradients) - 2 * LAYERS
    torch.testing.assert_close(
        {name: gradients[name] for name in others}, {name: own_gradients[name] for name in others}, **MODEL_BOUNDS
    )
    # The places where the gradient jumps are the only cause: a millionth of a pixel beside them, all agrees.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sampling_offsets.bias"):
                parameter += 1e-6
    own, own_gradients = _step(model, inputs)
    with _replaced(modeling):
        outputs, gradients = _step(model, inputs)
    torch.testing.assert_close(gradients, own_gradients, **MODEL_BOUNDS)


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The outputs, and the gradient of every parameter that the loss reaches."""
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def _replaced(modeling: ModuleType) -> Iterator[list]:
    """transformers with the replacement in it; collects the spatial shapes of every call of the operator."""
    core = modeling.MultiScaleDeformableAttention
    own = core.forward
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "forward", own)  # so that leaving undoes what the block of code assigns
        names = _execute(_block("modeling_deformable_detr"))
        assert core.forward is not own
        operator = names["deform_attn"]

        def recording(value: Tensor, spatial_shapes: Any, *points: Tensor) -> Tensor:
            calls.append(spatial_shapes)
            return operator(value, spatial_shapes, *points)

        names["deform_attn"] = recording
        yield calls
    assert core.forward is own


def _assert_same(outputs: Any, own: Any) -> None:
    """Every tensor of the two outputs: the loss and its parts, boxes, logits, the states of all layers."""
    assert {"loss", "loss_dict", "logits", "pred_boxes", "encoder_last_hidden_state"} <= outputs.keys()
    assert outputs.logits.isfinite().all()
    torch.testing.assert_close(dict(outputs), dict(own), **MODEL_BOUNDS)


def _block(content: str) -> str:
    """The one block of Python in the section of docs/op.md that holds this text."""
    section = DOCUMENT.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    (block,) = [found for found in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if content in found]
    return block


def _execute(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "docs_op"}
    exec(compile(block, str(DOCUMENT), "exec"), names)
    return names
