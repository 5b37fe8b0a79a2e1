"""Backbones of timm's families: a real step in float32 and bfloat16, what trains of each, and what is refused."""

import pytest
import torch
from ddetr.core.config import ModelConfig
from ddetr.core.model.backbone import Backbone
from ddetr.core.model.feature_maps import feature_maps
from ddetr.core.model.frozen_norm import FrozenNorm, freeze_batch_norms
from timm.layers import BatchNormAct2d
from timm.models import FeatureInfo
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from tests.core.test_detector import small

pytestmark = pytest.mark.integration

# What must not train beside batch norms, by the beginnings of the parameters' names: the stem and the first stage.
# HRNet's stages run side by side: of what gives its stride 4 alone nothing is used.
FIRST_STAGE = {
    "efficientnet_b0": ("conv_stem", "blocks.0", "blocks.1"),
    "regnetx_002": ("stem", "s1"),
    "resnet18d": ("conv1", "layer1"),
    "mobilenetv3_small_050": ("conv_stem", "blocks.0"),
    "densenet121": ("features_conv0", "features_norm0", "features_denseblock1"),
    "dla34": ("base_layer", "level0", "level1", "level2"),
    "vgg11_bn": ("features_0", "features_4", "features_8", "features_11"),
    "resnest14d": ("conv1", "layer1"),
    "res2net50d": ("conv1", "layer1"),
    "swin_tiny_patch4_window7_224": ("patch_embed", "layers_0"),
    "hrnet_w18_small": (
        *("conv1", "conv2", "layer1", "transition1.0"),
        *("stage4.0.fuse_layers.0", "stage4.1.fuse_layers.0", "incre_modules.0"),
    ),
    "convnext_atto": ("stem_0", "stem_1", "stages_0"),
    "tf_efficientnetv2_b0": ("conv_stem", "blocks.0", "blocks.1"),
    "swinv2_tiny_window8_256": ("patch_embed", "layers_0"),
}


def take_step(dtype: torch.dtype, **settings: object) -> dict[str, nn.Parameter]:
    """Forward and backward pass of an image of odd size, with parameters and images as the engine has them.

    It leaves buffers in float32. Returns the backbone's parameters.
    """
    model = small(**settings).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    images, padding_mask = torch.randn(2, 3, 70, 93).to(dtype), torch.zeros(2, 70, 93, dtype=torch.bool)
    shapes = [feature.shape for feature in model.backbone(images)]
    assert [shape[2:] for shape in shapes] == [(9, 12), (5, 6), (3, 3)]
    assert tuple(shape[1] for shape in shapes) == model.backbone.channels
    predictions = model(images, padding_mask)
    assert predictions.proposals is not None
    logits = predictions.proposals[0]
    (predictions.logits.square().sum() + predictions.boxes.sum() + logits.square().mean()).backward()
    parameters = dict(model.backbone.body.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return parameters


# In bfloat16 a CPU takes twice as long. Those with buffers of their own, which stay in float32, and a plain one are in
# `make test`.
BF16 = ("resnet18d", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")


@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [
        pytest.param(name, dtype, marks=() if dtype == "float32" or name in BF16 else pytest.mark.slow)
        for name in FIRST_STAGE
        for dtype in ("float32", "bfloat16")
    ],
)
def test_a_family_takes_a_step_and_trains_from_c3_on(backbone: str, dtype: str) -> None:
    parameters = take_step(getattr(torch, dtype), backbone=backbone, backbone_norm="frozen_batch")
    assert parameters
    for name, parameter in parameters.items():
        in_first_stage = any(f"{name}.".startswith(f"{start}.") for start in FIRST_STAGE[backbone])
        assert parameter.requires_grad != in_first_stage, name


@pytest.mark.parametrize("backbone", ["efficientnet_b0", "resnet18d", "dla34", "mobilenetv3_small_050"])
def test_with_group_norms_a_family_trains_as_a_whole(backbone: str) -> None:
    parameters = take_step(torch.bfloat16, backbone=backbone, backbone_norm="group")
    assert all(parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
def test_no_batch_norm_is_left(norm: str) -> None:
    body = Backbone(ModelConfig(backbone="efficientnet_b0", pretrained_backbone=False, backbone_norm=norm)).body
    assert not [name for name, module in body.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ("vit_tiny_patch16_224", r"no feature map at stride \[8, 32\]"),
        ("resnet5000", "timm cannot build it"),
        (
            "inception_v4",
            r"of images of 299 x 299 pixels its map of stride 8 is \(2, 384, 35, 35\) and not .*; take another",
        ),
    ],
)
def test_a_backbone_that_cannot_work_is_refused(backbone: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"model.backbone='{backbone}'.*{reason}"):
        small(backbone=backbone, backbone_norm="frozen_batch")


def test_a_backbone_without_dilation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'dla34': .* feature extractor with model.dilation=true \(it has none\)"):
        small(backbone="dla34", dilation=True, levels=1, box_refine=False, two_stage=False)


class Body(nn.Module):
    """A model as timm makes them, of one map at stride 8."""

    def __init__(self, norm: type[nn.Module], maps: int) -> None:
        super().__init__()
        self.convolution, self.norm, self._maps = nn.Conv2d(3, 4, 3, stride=8, padding=1), norm(4), maps
        self.feature_info = FeatureInfo([{"num_chs": 4, "reduction": 8, "module": "norm"}], (0,))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.norm(self.convolution(images))] * self._maps


@pytest.mark.parametrize(
    ("norm", "maps", "message"),
    [
        (nn.Identity, 2, "it returns 2 feature maps and names 1"),
        (nn.SyncBatchNorm, 1, "norm.num_batches_tracked follows the batches, in a norm that is no BatchNorm2d"),
    ],
)
def test_models_that_are_not_what_they_say_are_refused(norm: type[nn.Module], maps: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        feature_maps(Body(norm, maps), (0,), message)
    assert feature_maps(Body(nn.Identity, 1), (0,), message).piece == 1


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "with an activation"])
def test_a_frozen_norm_rounds_once(fused: bool) -> None:
    """In bfloat16 its scale and shift are those of float32, rounded; in float32 it is torchvision's to the bit."""
    norm = (BatchNormAct2d if fused else nn.BatchNorm2d)(64).eval()
    with torch.no_grad():
        for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", 50, 90), ("running_var", 1, 9)):
            getattr(norm, name).uniform_(low, high)
    body = nn.Sequential(nn.Sequential(norm))
    expected_norm = FrozenBatchNorm2d(64)
    expected_norm.load_state_dict({name: value for name, value in norm.state_dict().items() if "num" not in name})
    freeze_batch_norms(body)
    (frozen,) = (module for module in body.modules() if isinstance(module, FrozenNorm))
    x = torch.randn(2, 64, 5, 7) * 2 + 70
    assert torch.equal(body(x), expected_norm(x).relu() if fused else expected_norm(x))
    scale = (norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()).view(-1, 1, 1)
    shift = norm.bias.double().view(-1, 1, 1) - norm.running_mean.double().view(-1, 1, 1) * scale
    expected = x.bfloat16() * scale.bfloat16() + shift.bfloat16()
    found = body(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.relu() if fused else expected, rtol=0.01, atol=0.01)
    assert all(buffer.dtype == torch.float32 for buffer in frozen.buffers())
