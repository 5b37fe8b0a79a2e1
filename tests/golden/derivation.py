"""Weights, images and objects that follow from names and seeds: what both sides of a comparison start from.

Nothing is random beyond NumPy's legacy `RandomState`, whose streams are the same in every version. So no weights need
to be stored, and a model of any size has some. No tensor of them is zero or constant, as many are at a real
initialisation: what a zero would hide, shows.

Arithmetic is in float64, in the order written here, and rounded to float32 once; the reference outputs were computed
with these very numbers.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ddetr.core.config import ModelConfig

WAVES = 6  # in each channel of an image


@dataclass(frozen=True)
class Draw:
    """What a rule makes a tensor's values of."""

    noise: np.ndarray  # float64, of the tensor's shape, normally distributed
    config: ModelConfig


Rule = Callable[[Draw], np.ndarray]


def _around(centre: float, spread: float) -> Rule:
    return lambda draw: centre + spread * draw.noise


def _fan_in(gain: float) -> Rule:
    """Of a convolution (out, in, height, width): what it sums has the variance `gain`."""
    return lambda draw: draw.noise * math.sqrt(gain / math.prod(draw.noise.shape[1:]))


def _fan_both(draw: Draw) -> np.ndarray:
    return draw.noise * math.sqrt(2.0 / sum(draw.noise.shape))


def _projection(spread: float) -> Rule:
    """Of a linear layer (out, in): what it makes of unit inputs deviates by `spread`."""
    return lambda draw: draw.noise * spread / math.sqrt(draw.noise.shape[1])


def _variance(draw: Draw) -> np.ndarray:
    return 1.0 + 0.2 * np.abs(draw.noise)


def _damped(draw: Draw) -> np.ndarray:
    """Scale of a batch norm that ends a residual branch, so that fifty layers do not add up to infinity."""
    return 0.3 * (1.0 + 0.1 * draw.noise)


def _rays(draw: Draw) -> np.ndarray:
    """Biases of the sampling offsets: head h looks along 2 pi h / H, point k to distance k, in every level."""
    heads, numbers = draw.config.heads, draw.noise.size
    levels = 4 if numbers // (2 * heads) % 4 == 0 else 1
    points = numbers // (2 * heads * levels)
    angles = np.arange(heads) * (2.0 * math.pi / heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=-1, keepdims=True)
    distances = np.arange(1, points + 1)
    rays = directions[:, None, None, :] * distances[None, None, :, None]
    rays = np.broadcast_to(rays, (heads, levels, points, 2))
    return rays.reshape(-1) + 0.3 * draw.noise


def _box_bias(draw: Draw) -> np.ndarray:
    """Without proposals to start from, boxes start small."""
    return 0.1 * draw.noise + (0.0 if draw.config.two_stage else np.array([0.0, 0.0, -2.0, -2.0]))


# The first pattern found in a parameter's published name decides.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"\.running_var$", _variance),
    (r"\.running_mean$", _around(0.0, 0.1)),
    (r"^backbone\..*(conv\d|downsample\.0)\.weight$", _fan_in(2.0)),
    (r"^backbone\..*\.bn3\.weight$", _damped),
    (r"^backbone\..*\.weight$", _around(1.0, 0.1)),  # other batch norms
    (r"\.sampling_offsets\.weight$", _projection(0.7)),
    (r"\.sampling_offsets\.bias$", _rays),
    (r"\.attention_weights\.weight$", _projection(1.0)),
    (r"^class_embed\.\d+\.bias$", _around(-math.log(99.0), 0.3)),  # a class has the probability 0.01
    (r"^bbox_embed\.\d+\.layers\.2\.weight$", _projection(0.5)),
    (r"^bbox_embed\.\d+\.layers\.2\.bias$", _box_bias),
    (r"^(query_embed\.weight|transformer\.level_embed)$", _around(0.0, 1.0)),
    (r"^input_proj\.\d+\.0\.weight$", _fan_in(1.0)),
    (r"(norm\d?|input_proj\.\d+\.1)\.weight$", _around(1.0, 0.1)),
    (r"weight$", _fan_both),  # linear layers
    (r"bias$", _around(0.0, 0.1)),
)


def first_name(name: str, config: ModelConfig) -> str:
    """The published name under which a parameter's values are drawn.

    The published layout lists the heads a second time below the decoder, and without box refinement one and the same
    head under the number of every layer.
    """
    name = re.sub(r"^transformer\.decoder\.(?=(class|bbox)_embed\.)", "", name)
    return name if config.box_refine else re.sub(r"^((?:class|bbox)_embed)\.\d+", r"\1.0", name)


def weight(name: str, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """The float32 values, of this shape, of the parameter or buffer that is published as `name`."""
    name = first_name(name, config)
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    rule = next(rule for pattern, rule in RULES if re.search(pattern, name))
    return rule(Draw(noise, config)).astype(np.float32)


def image(seed: int, height: int, width: int) -> np.ndarray:
    """(3, height, width) float32, in the range of a normalised image: slow and fast waves, and noise."""
    random = np.random.RandomState(seed)
    down, right, phase, strength = (0.01, 0.25), (0.01, 0.25), (0.0, 2 * math.pi), (0.2, 0.7)
    lowest, highest = zip(down, right, phase, strength, strict=True)
    waves = random.uniform(lowest, highest, (3, WAVES, 4))
    y, x = np.arange(float(height))[:, None], np.arange(float(width))
    channels = np.zeros((3, height, width))
    for channel, of_channel in zip(channels, waves, strict=True):
        for along_y, along_x, start, amplitude in of_channel:
            channel += amplitude * np.sin(along_y * y + along_x * x + start)
    return (channels + 0.3 * random.standard_normal(channels.shape)).astype(np.float32)


def objects(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (number, 4) float32, cxcywh, all within the image, with sides from 0.05 to 0.5 of it; labels (number,)
    int64 from 1 to 90."""
    random = np.random.RandomState(seed)
    sides = random.uniform(0.05, 0.5, (number, 2))
    centres = sides / 2 + random.uniform(0, 1, (number, 2)) * (1 - sides)
    boxes = np.concatenate([centres, sides], axis=1).astype(np.float32)
    return boxes, random.randint(1, 91, number).astype(np.int64)
