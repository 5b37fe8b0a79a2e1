"""Hugging Face transformers' detectors made like ours: configuration, names of weights, predictions, losses.

Where they deviate from the published code, which ours follows, a comment says how that is met.
"""

import copy
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from ddetr.core.config import ModelConfig
from ddetr.core.model.outputs import Predictions
from torch import Tensor, nn

# A published name becomes theirs by these substitutions, one after another.
BOTH = [
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^transformer\.", "model."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
]
NAMES = {
    "deformable_detr": [
        *BOTH,
        (r"^input_proj\.", "model.input_proj."),
        (r"\.cross_attn\.", ".encoder_attn."),
        (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    ],
    "detr": [
        *BOTH,
        (r"^input_proj\.", "model.input_projection."),
        (r"\.multihead_attn\.out_proj\.", ".encoder_attn.o_proj."),
        (r"\.multihead_attn\.", ".encoder_attn."),
        (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
        (r"decoder\.norm\.", "decoder.layernorm."),
        (r"^class_embed\.", "class_labels_classifier."),
        (r"^bbox_embed\.", "bbox_predictor."),
    ],
}


def their_detector(transformers: ModuleType, config: ModelConfig) -> Any:
    settings: dict[str, Any] = {
        "backbone": config.backbone.split(".")[0],  # of timm, without weights: nothing is fetched
        "d_model": config.hidden_dim,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.feedforward_dim,
        "decoder_ffn_dim": config.feedforward_dim,
        "num_queries": config.queries,
        "num_labels": config.num_classes,
        "dropout": config.dropout,
        "dilation": config.dilation,
    }
    if config.architecture == "detr":
        # With auxiliary_loss their decoder hands each layer's normalised output to the next layer; the published one
        # normalises only what the heads see. So it is off, and the heads are applied to the earlier layers below.
        return transformers.DetrForObjectDetection(transformers.DetrConfig(**settings))
    theirs = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            **settings,
            num_feature_levels=config.levels,
            encoder_n_points=config.points,
            decoder_n_points=config.points,
            with_box_refine=config.box_refine,
            two_stage=config.two_stage,
            two_stage_num_proposals=config.queries,
            class_cost=2,  # as published; their default is 1
            auxiliary_loss=True,
        )
    )
    if config.box_refine and not config.two_stage:
        # They let all layers share one class head here; in the published code each has its own, as in two-stage.
        theirs.class_embed = nn.ModuleList(copy.deepcopy(head) for head in theirs.class_embed)
    return theirs


def their_names(published: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by their published names to the same by their names in transformers."""
    renamed = {}
    for name, tensor in published.items():
        for pattern, replacement in NAMES[config.architecture]:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name):  # three projections in one
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{match[1]}.{projection}_proj.{match[2]}"] = part
        else:
            renamed[name] = tensor
    return renamed


def their_predictions(theirs: Any, images: Tensor, padding_mask: Tensor) -> Predictions:
    mask = (~padding_mask).long()
    if theirs.config.model_type == "detr":
        outputs = theirs(images, mask, output_hidden_states=True)
        aux = []
        for states in outputs.decoder_hidden_states[1:-1]:  # the first are the queries as they enter
            seen = theirs.model.decoder.layernorm(states)
            aux.append((theirs.class_labels_classifier(seen), theirs.bbox_predictor(seen).sigmoid()))
        return Predictions.of([*aux, (outputs.logits, outputs.pred_boxes)], softmax=True)
    no_objects = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)} for _ in images]
    outputs = theirs(images, mask, labels=no_objects)  # without labels it does not return the earlier layers
    proposals = None
    if theirs.config.two_stage:
        proposals = (outputs.enc_outputs_class, outputs.enc_outputs_coord_logits.sigmoid())
    layers = [(layer["logits"], layer["pred_boxes"]) for layer in (*outputs.auxiliary_outputs, outputs)]
    return Predictions.of(layers, proposals)


def their_losses(theirs: Any, predictions: Predictions, labels: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and cardinality errors, laid out as in our Losses."""
    config = copy.deepcopy(theirs.config)
    config.auxiliary_loss = True
    logits, boxes = (
        torch.stack(part) for part in zip(*predictions.aux, (predictions.logits, predictions.boxes), strict=True)
    )
    cpu = torch.device("cpu")
    _, losses, _ = theirs.loss_function(logits[-1], labels, cpu, boxes[-1], config, logits, boxes)
    suffixes = [f"_{layer}" for layer in range(len(predictions.aux))] + [""]
    if predictions.proposals is not None:
        # They leave the proposals without a loss; the published criterion takes it with label 0 for every object.
        config.auxiliary_loss = False
        logits, boxes = predictions.proposals
        _, of_proposals, _ = theirs.loss_function(logits, without_classes(labels), cpu, boxes, config)
        losses |= {f"{name}_proposals": value for name, value in of_proposals.items()}
        suffixes.append("_proposals")
    values = torch.stack(
        [torch.stack([losses[f"loss_{part}{suffix}"] for suffix in suffixes]) for part in ("ce", "bbox", "giou")]
    )
    return values, torch.stack([losses[f"cardinality_error{suffix}"] for suffix in suffixes])


def without_classes(labels: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [image | {"class_labels": torch.zeros_like(image["class_labels"])} for image in labels]


def their_matcher(theirs: Any) -> nn.Module:
    config = theirs.config
    if config.model_type == "detr":
        kind = import_module("transformers.loss.loss_for_object_detection").HungarianMatcher
    else:
        kind = import_module("transformers.loss.loss_deformable_detr").DeformableDetrHungarianMatcher
    return kind(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
