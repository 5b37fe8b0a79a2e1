"""The cost of a detector: parameters and multiply-adds (FLOPs) of each of its parts.

Nothing is computed: the model runs on torch's meta device, where tensors have shapes but no values.
A multiply-add is what the paper's table 1 counts as one FLOP. Convolutions, matrix products, attention and deformable
attention count; what is linear in the features (norms, activations, position embeddings, softmax) does not.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...ops.library import UNAVAILABLE
from ..config import ModelConfig
from .detector import Detector, build

# The paper averages over images of COCO at a short side of 800 pixels and names no size. This is their mean: resized
# as for evaluation, 121 COCO images have 800 x 1122 pixels on average; 4:3 would be 1067 wide, 3:2 1200. At widths
# from 1096 to 1136 all published counts hold within 5 %. Both sides are multiples of 32: no token is partly padding.
IMAGE_SIZE = (800, 1120)

# Parts by the beginnings of their parameters' and modules' names, in the order of the forward pass.
_FIRST_STAGE = "first stage"
PARTS = {
    "backbone": ("backbone.",),
    "feature projections": ("input_proj.",),
    "encoder": ("transformer.encoder.", "transformer.level_embed."),
    _FIRST_STAGE: ("transformer.enc_output", "transformer.pos_trans"),  # and its own heads
    "decoder": ("transformer.decoder.", "transformer.reference_points.", "query_embed."),
    "class heads": ("class_embed.",),
    "box heads": ("bbox_embed.",),
}

OTHERS = "others"


@dataclass(frozen=True)
class Cost:
    """Of a part, or of the whole model."""

    num_trained: int  # parameters
    num_frozen: int  # parameters
    num_multiply_adds: int  # of the forward pass of one image

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.num_trained + other.num_trained,
            self.num_frozen + other.num_frozen,
            self.num_multiply_adds + other.num_multiply_adds,
        )


def costs(config: ModelConfig, image_size: tuple[int, int] = IMAGE_SIZE) -> dict[str, Cost]:
    """The cost of each part that the model has, in the order of the forward pass, for one image without padding.

    image_size: (height, width) in pixels. "first stage" is all that makes the proposals, its class and box heads
    included; the other heads are those of the decoder's layers.

    Raises ValueError for a size that is not positive or a backbone that timm cannot build, OSError without the op.
    """
    if min(image_size) < 1:
        raise ValueError(f"image_size={image_size}: height and width must be positive")
    with torch.device("meta"):
        model = build(config.model_copy(update={"pretrained_backbone": False})).eval()
    trained, frozen = Counter(), Counter()
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[part_of(name, config)] += parameter.numel()
    multiply_adds = _multiply_adds(model, image_size)
    return {part: Cost(trained[part], frozen[part], multiply_adds[part]) for part in PARTS if part in multiply_adds}


def _multiply_adds(model: Detector, image_size: tuple[int, int]) -> Counter[str]:
    """Multiply-adds by part, attributed to the outermost module of a part that is called."""
    if "cpu" in UNAVAILABLE:
        raise OSError(f"the attention op cannot be counted: {UNAVAILABLE['cpu']}")
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.ddetr.fused_deform_attn: _deformable_attention_flops}
    )
    with torch.device("meta"), torch.no_grad(), counter:
        model(torch.empty(1, 3, *image_size), torch.empty(1, *image_size, dtype=torch.bool))
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    total = flops.pop("Global")
    model_name = type(model).__name__
    del flops[model_name]
    parts: Counter[str] = Counter()
    for path, count in flops.items():
        if not any(path.startswith(f"{outer}.") for outer in flops):
            parts[part_of(path.removeprefix(f"{model_name}."), model.config)] += count // 2  # two FLOPs a multiply-add
    assert sum(parts.values()) * 2 == total, "every product belongs to a part"
    return parts


def _deformable_attention_flops(
    value: list[int],
    spatial_shapes: list[int],
    reference_points: list[int],
    sampling_offsets: list[int],
    attention_logits: list[int],
    **_output: object,
) -> int:
    """Five multiply-adds for each channel of each sampled point: four corners, one weight (appendix A.1, "5 N_q K C").

    Shapes of the arguments of `fused_deform_attn`: value (N, S, H, D), sampling_offsets (N, Q, H, L, P, 2).
    """
    return 2 * 5 * math.prod(sampling_offsets[:5]) * value[3]


def part_of(name: str, config: ModelConfig) -> str:
    """The part of a parameter or module; the heads after those of the decoder's layers are the first stage's.

    A name that no detector has is one of OTHERS.
    """
    name = f"{name}."
    if name.startswith((f"class_embed.{config.decoder_layers}.", f"bbox_embed.{config.decoder_layers}.")):
        return _FIRST_STAGE
    return next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), OTHERS)
