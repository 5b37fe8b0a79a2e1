"""Deformable DETR, from normalised images to class logits and boxes (section 4).

Shapes: N images, H x W pixels, L levels, S tokens of all levels, Q queries, C hidden_dim, K classes.
Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image.
"""

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import MultiScaleDeformableAttention
from .backbone import Backbone
from .detr import Detr
from .heads import MLP, class_head
from .outputs import Predictions
from .position import padding_of, proposal_position, sine_position
from .transformer import DecoderLayer, Encoder, SpatialShapes, decoder_reference_points, run_layer


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))


class Transformer(nn.Module):
    """Encoder, decoder, and the parts that exist once for all their layers.

    Embeddings are modules, called for their rows: ZeRO-3 gathers a parameter only when its own module is called.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.level_embed = nn.Embedding(config.levels, c)
        if config.two_stage:
            self.enc_output = nn.Linear(c, c)
            self.enc_output_norm = nn.LayerNorm(c)
            self.pos_trans = nn.Linear(2 * c, 2 * c)
            self.pos_trans_norm = nn.LayerNorm(2 * c)
        else:
            self.reference_points = nn.Linear(c, 2)


class DeformableDetr(nn.Module):
    """Deformable DETR with its two variants, iterative box refinement and two-stage (section 4).

    Raises ValueError when the backbone cannot be used, OSError when its pretrained weights cannot be fetched.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config.hidden_dim
        self.backbone = Backbone(config)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, c, kernel_size=1), nn.GroupNorm(32, c))
            for channels in self.backbone.channels
        )
        channels = self.backbone.channels[-1]
        for _ in range(config.levels - len(self.backbone.channels)):  # C6 and coarser, by stride-2 convolutions
            self.input_proj.append(
                nn.Sequential(nn.Conv2d(channels, c, kernel_size=3, stride=2, padding=1), nn.GroupNorm(32, c))
            )
            channels = c
        self.transformer = Transformer(config)
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.queries, 2 * c)
        heads = 1  # shared by all decoder layers, unless boxes are refined; the last one makes the proposals
        if config.box_refine:
            heads = config.decoder_layers + config.two_stage
        classes = class_head(config)
        self.class_embed = nn.ModuleList([classes, *(copy.deepcopy(classes) for _ in range(heads - 1))])
        boxes = MLP(c, 4)
        nn.init.zeros_(boxes.output_layer.weight)  # moves nothing, yet
        nn.init.zeros_(boxes.output_layer.bias)
        self.bbox_embed = nn.ModuleList([boxes, *(copy.deepcopy(boxes) for _ in range(heads - 1))])
        if not config.two_stage:  # without proposals the first boxes come from here: start small
            nn.init.constant_(boxes.output_layer.bias[2:], -2.0)
        self._reset_parameters()

    def forward(self, images: Tensor, padding_mask: Tensor) -> Predictions:
        """images (N, 3, H, W) normalised, zero on padding; padding_mask (N, H, W) bool, True on padding.

        Returns logits (N, Q, K) and boxes (N, Q, 4) of every decoder layer, and with two_stage the proposals.
        """
        tokens, position, shapes, mask, valid_ratios = self._tokens(images, padding_mask)
        memory = self.transformer.encoder(tokens, position, valid_ratios, shapes, mask)
        proposals = None
        if self.config.two_stage:
            proposals, queries, query_position, reference = self._propose(memory, shapes, mask)
        else:
            embedding = self.query_embed(torch.arange(self.config.queries, device=images.device))
            query_position, queries = embedding.expand(len(images), -1, -1).chunk(2, dim=-1)
            reference = self.transformer.reference_points(query_position).float().sigmoid()

        layers = []
        for index, layer in enumerate(self.transformer.decoder.layers):
            points = decoder_reference_points(reference, valid_ratios)
            queries = run_layer(layer, queries, query_position, points, memory, shapes, mask)
            head = index if self.config.box_refine else 0
            boxes = _shift(reference, self.bbox_embed[head](queries)).sigmoid()
            layers.append((self.class_embed[head](queries).float(), boxes))
            if self.config.box_refine:
                reference = boxes.detach()
        return Predictions.of(layers, proposals)

    def _tokens(
        self, images: Tensor, padding_mask: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor, Tensor]:
        """Feature maps of all levels one after another (section 4.1 and appendix A.2).

        Returns tokens and position (N, S, C), the levels' (height, width), padding_mask (N, S) and
        valid_ratios (N, L, 2), the unpadded share of each level's (width, height).
        """
        features = self.backbone(images)
        maps = [project(feature) for project, feature in zip(self.input_proj, features, strict=False)]
        source = features[-1]
        for project in self.input_proj[len(features) :]:
            source = project(source)
            maps.append(source)

        tokens, positions, shapes, masks, ratios = [], [], [], [], []
        level_embeds = self.transformer.level_embed(torch.arange(len(maps), device=images.device))
        for feature, level_embed in zip(maps, level_embeds, strict=True):
            mask = padding_of(feature, padding_mask)
            position = sine_position(mask, self.config.hidden_dim).to(feature.dtype)
            height, width = feature.shape[-2:]
            tokens.append(feature.flatten(2).transpose(1, 2))
            positions.append(position.flatten(2).transpose(1, 2) + level_embed)
            shapes.append((height, width))
            masks.append(mask.flatten(1))
            ratios.append(torch.stack([(~mask[:, 0, :]).sum(1) / width, (~mask[:, :, 0]).sum(1) / height], dim=-1))
        return (
            torch.cat(tokens, dim=1),
            torch.cat(positions, dim=1),
            shapes,
            torch.cat(masks, dim=1),
            torch.stack(ratios, dim=1).float(),
        )

    def _propose(
        self, memory: Tensor, shapes: SpatialShapes, padding_mask: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """The first stage (section 4.2, "two-stage", and appendix A.4): every token proposes one box.

        Returns the proposals, and for the Q best of them the queries (N, Q, C), their position embedding (N, Q, C)
        and their boxes (N, Q, 4). The best are those of highest logit for class 0, the "object" class of this head.
        """
        anchors, usable = _anchors(shapes, padding_mask, self.config.proposal_size)
        memory = memory.masked_fill(~usable[..., None], 0.0)
        memory = self.transformer.enc_output_norm(self.transformer.enc_output(memory))
        logits = self.class_embed[-1](memory).float()
        unactivated = self.bbox_embed[-1](memory).float() + anchors
        best = logits[..., 0].topk(min(self.config.queries, logits.shape[1]), dim=1).indices
        reference = unactivated.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        embedding = proposal_position(reference, self.config.hidden_dim).to(memory.dtype)
        embedding = self.transformer.pos_trans_norm(self.transformer.pos_trans(embedding))
        query_position, queries = embedding.chunk(2, dim=-1)
        return (logits, unactivated.sigmoid()), queries, query_position, reference

    def _reset_parameters(self) -> None:
        """The published initialisation; the backbone keeps its own."""
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.transformer.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.reset_parameters()
        if not self.config.two_stage:
            nn.init.zeros_(self.transformer.reference_points.bias)
        nn.init.normal_(self.transformer.level_embed.weight)
        for module in self.input_proj.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))


Detector = DeformableDetr | Detr


def build(config: ModelConfig) -> Detector:
    """Build the detector of `model.architecture`. Raises what `DeformableDetr` raises."""
    return Detr(config) if config.architecture == "detr" else DeformableDetr(config)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """The logit of x clamped to [1e-5, 1 - 1e-5]."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


def _shift(reference: Tensor, delta: Tensor) -> Tensor:
    """Unactivated boxes (N, Q, 4): `delta` around reference points (N, Q, 2) or boxes (N, Q, 4) (appendix A.3)."""
    anchor = inverse_sigmoid(reference)
    return delta.float() + F.pad(anchor, (0, 4 - anchor.shape[-1]))


def _anchors(shapes: SpatialShapes, padding_mask: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Each token's box before the first stage's correction, and whether the token may propose at all (appendix A.4).

    A box is centred on its token; its sides are `size` of the image on the finest level and double with each level.

    Returns logits of boxes (N, S, 4), infinite where unusable, and usable (N, S): not padding, and the whole
    box's numbers within (0.01, 0.99).
    """
    boxes, start = [], 0
    for level, (height, width) in enumerate(shapes):
        mask = padding_mask[:, start : start + height * width].view(-1, height, width)
        valid = torch.stack([(~mask[:, 0, :]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1).float()
        y = torch.arange(height, device=mask.device) + 0.5
        x = torch.arange(width, device=mask.device) + 0.5
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x.reshape(-1), y.reshape(-1)], dim=-1)[None] / valid[:, None]
        boxes.append(torch.cat([centre, torch.full_like(centre, size * 2.0**level)], dim=-1))
        start += height * width
    boxes = torch.cat(boxes, dim=1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~padding_mask
    anchors = torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], float("inf"))
    return anchors, usable
