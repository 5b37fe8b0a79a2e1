"""The configuration: its sections and settings, their defaults and what fits together.

Reading and checking it as a whole: core/config.py.
"""

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..data.addresses import RAY_ADDRESS
from ..data.config import DataConfig
from ..data.location import Location
from ..data.multiples import nearest
from ..data.setting import Section, setting
from ..data.text import visible

MOST_CHANNELS = 4096  # of a token
NORM_GROUPS = 32
MOST_NESTED = 32  # maps and lists in each other
LONGEST_NAME = 200  # bytes of train.name, which other names are made from; file systems take 255


class ModelConfig(Section):
    """The detector (Deformable DETR, section 4 and appendix A.4). The defaults are the published ones."""

    architecture: Literal["deformable_detr", "detr"] = setting(
        "deformable_detr", "detector: Deformable DETR, or DETR, the paper's baseline"
    )
    backbone: str = setting("resnet50.tv_in1k", "backbone (feature extractor): any timm model with features_only")
    pretrained_backbone: bool = setting(True, "the backbone starts from its pretrained weights, which timm fetches")
    backbone_norm: Literal["frozen_batch", "group"] = setting(
        "frozen_batch",
        "normalisation in the backbone: frozen_batch (frozen batch norm) needs pretrained weights; group (group norm) "
        "trains from scratch",
    )
    dilation: bool = setting(False, "dilated convolutions: C5 at stride 16 instead of 32 (the published DC5)")
    hidden_dim: int = setting(
        256, "hidden dimension of the transformer (embedding width)", unit="channels of a token", gt=0, le=MOST_CHANNELS
    )
    heads: int = setting(8, "number of heads of multi-head attention", unit="heads per attention layer", gt=0, le=1024)
    levels: int = setting(
        4,
        "feature levels (scales) of deformable attention: C3, C4, C5 and stride-2 levels; 1 is C5 alone; not 2",
        unit="levels",
        ge=1,
        le=16,
    )
    points: int = setting(4, "sampling points of deformable attention", unit="points per head and level", ge=1, le=256)
    multi_scale_attention: bool = setting(
        True, "false: a token of the encoder sees its own level only (the paper's table 2)"
    )
    encoder_layers: int = setting(6, "depth of the transformer encoder", unit="layers", ge=1, le=128)
    decoder_layers: int = setting(6, "depth of the transformer decoder", unit="layers", ge=1, le=128)
    feedforward_dim: int = setting(
        1024, "hidden width of the feed-forward networks (FFN)", unit="channels of a token", gt=0, le=65536
    )
    queries: int = setting(300, "object queries: the most objects found", unit="queries per image", gt=0, le=100_000)
    dropout: float = setting(0.1, "dropout in the transformer while training", unit="probability", ge=0, lt=1)
    box_refine: bool = setting(
        False, "iterative bounding box refinement: each decoder layer corrects the boxes of the one before"
    )
    two_stage: bool = setting(False, "two-stage: the encoder proposes boxes, the best of which become object queries")
    proposal_size: float = setting(
        0.05,
        "side of the first stage's boxes (anchors) on the finest level; doubles with each level",
        unit="share of the image's side",
        gt=0,
        lt=0.99,
    )
    num_classes: int = setting(
        80,
        "object classes; leave it unset: the training set decides, and another number is an error",
        unit="classes",
        gt=0,
        le=1_000_000,
    )
    classification: Literal["sigmoid", "softmax"] = setting(
        "sigmoid", 'classification loss: sigmoid, focal loss; softmax, cross entropy with "no object" (DETR)'
    )

    def misfits(self) -> Iterator[str]:
        divisor = math.lcm(self.heads, NORM_GROUPS)
        if self.hidden_dim % divisor:
            yield (
                f"hidden_dim must be a multiple of heads and of {NORM_GROUPS} (the norm's groups), got "
                f"{self.hidden_dim} with heads={self.heads}; {nearest(self.hidden_dim, divisor, MOST_CHANNELS)}"
            )
        if self.levels == 2:
            yield "levels must be 1 (C5 alone) or at least 3 (C3, C4, C5 and stride-2 levels), got 2"
        if self.dilation and self.levels > 1:
            yield f"dilation is for one level, C5 (the published DC5), got levels={self.levels}"
        if self.architecture == "detr" and (self.levels > 1 or self.box_refine or self.two_stage):
            yield "architecture=detr has levels=1 and neither box_refine nor two_stage"
        if self.architecture == "deformable_detr" and self.classification == "softmax":
            yield "classification=softmax is DETR's; Deformable DETR has classification=sigmoid"
        if not self.multi_scale_attention and self.levels == 1:
            yield "multi_scale_attention=false is for several levels, got levels=1"
        if self.two_stage and not self.box_refine:
            yield "two_stage needs box_refine=true (the published two-stage model builds on refinement)"
        if self.pretrained_backbone and self.backbone_norm == "group":
            yield "backbone_norm=group has no pretrained weights; set pretrained_backbone=false"


_Decay = Annotated[float, Field(ge=0, lt=1)]
_Epoch = Annotated[int, Field(ge=0)]


class OptimConfig(Section):
    """AdamW, parameter groups, losses and schedule (section 5, implementation details)."""

    learning_rate: float = setting(
        2e-4, "learning rate of AdamW, for train.batch_size images a step", unit="step size", gt=0
    )
    backbone_multiplier: float = setting(
        0.1, "learning rate of the backbone; 0 freezes it", unit="multiple of learning_rate", ge=0
    )
    sampling_multiplier: float = setting(
        0.1,
        "learning rate of sampling offsets and reference points",
        unit="multiple of learning_rate",
        gt=0,
    )
    betas: tuple[_Decay, _Decay] = setting(
        (0.9, 0.999), "AdamW's betas: decay of the first and second moments", unit="decay factor per step"
    )
    weight_decay: float = setting(1e-4, "AdamW's decoupled weight decay", unit="multiple of the learning rate", ge=0)
    clip_norm: float = setting(
        0.1, "gradient clipping: a longer gradient is scaled down to this; 0 does not clip", unit="L2 norm", ge=0
    )
    schedule: Literal["step", "linear"] = setting(
        "step",
        "learning-rate schedule: step drops at drop_epochs; linear falls to zero over the last 40 % of the run",
    )
    drop_epochs: tuple[_Epoch, ...] = setting(
        (40,), "learning-rate decay of schedule=step: after these the rate is divided by ten", unit="epochs"
    )
    warmup_steps: int = setting(
        0,
        "learning-rate warm-up: steps over which the rate rises linearly to its full value",
        unit="optimizer steps",
        ge=0,
    )
    class_weight: float = setting(2.0, "weight of the classification loss, and in matching", unit="loss weight", ge=0)
    l1_weight: float = setting(5.0, "weight of the boxes' L1 loss, and in matching", unit="loss weight", ge=0)
    giou_weight: float = setting(2.0, "weight of the boxes' GIoU loss, and in matching", unit="loss weight", ge=0)
    focal_alpha: float = setting(
        0.25, "focal loss: weight of positives; negatives have 1 - alpha", unit="loss weight", ge=0, le=1
    )
    focal_gamma: float = setting(
        2.0,
        "focal loss: focusing exponent; below 1 the gradient would not be finite for confident predictions",
        unit="exponent",
        ge=1,
    )
    no_object_weight: float = setting(
        0.1, 'weight of "no object" in the cross entropy of softmax (DETR)', unit="loss weight", gt=0, le=1
    )


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (not levels or any(_is_deeper(item, levels - 1) for item in inner))


class TrainConfig(Section):
    """One training run and how DeepSpeed executes it."""

    output: Location = setting(Location("runs"), "output directory, in which the run's own folder is made")
    name: str | None = setting(None, "name of the run, that of its folder; by default the time of its start")
    auto_resume: bool = setting(
        False, "with name: resume the run of that name if it has a checkpoint; for launchers that repeat their command"
    )
    initial_weights: Location | None = setting(
        None, "fine-tuning: checkpoint to start from: a run, a safetensors file or a published checkpoint"
    )
    new_class_head: bool = setting(
        False, "fine-tuning: with initial_weights, all class heads start from scratch, whatever their classes"
    )
    epochs: int = setting(50, "length of the run: passes over the training set", unit="epochs", gt=0)
    max_steps: int | None = setting(
        None,
        "limit on the steps of the run; it ends with epochs or max_steps, whichever comes first",
        unit="optimizer steps",
        gt=0,
    )
    batch_size: int = setting(
        32,
        "global batch size: over all ranks and gradient accumulation",
        unit="images per optimizer step",
        gt=0,
    )
    accumulation: int = setting(
        1,
        "gradient accumulation: micro-batches that each rank adds up",
        unit="forward and backward passes per optimizer step",
        gt=0,
    )
    seed: int = setting(42, "random seed of weights, order, augmentation and dropout", unit="seed", ge=0)
    rank_timeout_seconds: float = setting(
        60,
        "heartbeat timeout: a rank silent for this long is lost; the others stop and name it",
        unit="seconds",
        gt=0,
    )
    collective_timeout_seconds: float = setting(
        1800,
        "hang detection: if no rank makes progress for this long, all stop and report where they are",
        unit="seconds",
        gt=0,
    )
    bandwidth_test_seconds: float = setting(
        2, "all-reduce test before the first step, which measures the network; 0 leaves it out", unit="seconds", ge=0
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device: auto takes GPUs where there are any")
    threads: int = setting(
        0,
        "CPU threads (intra-op parallelism); 0 shares the machine's cores among its ranks",
        unit="threads per rank",
        ge=0,
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "bf16", "mixed precision: bf16, fp16 (with loss scaling) or fp32 (none)"
    )
    zero_stage: Literal[0, 1, 2, 3] = setting(
        1,
        "DeepSpeed ZeRO, what is divided among the ranks: 1 optimizer state; 2 gradients too; 3 weights too; 0 nothing",
    )
    compile: bool = setting(False, "torch.compile for the backbone and each transformer layer")
    checkpoint_activations: bool = setting(
        False, "activation (gradient) checkpointing: transformer layers are computed again for the backward pass"
    )
    ema_decay: float | None = setting(
        None,
        "EMA of the weights: evaluate and export an exponential moving average (0.9997, say)",
        unit="decay factor per step",
        gt=0,
        lt=1,
    )
    most_skipped_steps: int = setting(
        10,
        "stop after this many consecutive skipped steps (loss or gradient NaN or infinite)",
        unit="optimizer steps",
        gt=0,
    )
    deepspeed_extra: dict[str, Any] = setting({}, "merged into the DeepSpeed JSON, for what is not modelled here")
    checkpoint_every_epochs: int = setting(
        1, "checkpoint interval, besides those before an evaluation and at the end; 0: those alone", unit="epochs", ge=0
    )
    checkpoint_every_steps: int | None = setting(
        None, "checkpoint interval within an epoch", unit="optimizer steps", gt=0
    )
    keep_checkpoints: int = setting(
        0, "number of newest checkpoints to keep, besides the best by score (AP); 0 keeps all", unit="checkpoints", ge=0
    )
    evaluate_every_epochs: int = setting(
        1, "validation interval; 0 never evaluates while training", unit="epochs", ge=0
    )
    log_every_steps: int = setting(10, "logging interval of progress and metrics.jsonl", unit="optimizer steps", gt=0)

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        if name is not None and (
            not name
            or name != name.strip()
            or name[0] in ".-"
            or "/" in name
            or "\\" in name
            or name != visible(name)
            or len(name.encode()) > LONGEST_NAME
        ):
            raise ValueError(
                f"expected the name of one folder, without / and \\ and signs that are not drawn, that starts with "
                f"neither . nor - nor a space and is at most {LONGEST_NAME} bytes long, got {name!r}"
            )
        return name

    @field_validator("deepspeed_extra")
    @classmethod
    def _is_json(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if _is_deeper(extra, MOST_NESTED):
            raise ValueError(f"it is nested more than {MOST_NESTED} levels deep")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"DeepSpeed reads JSON, which has no such value ({error}); text needs quotes") from error
        return extra

    def misfits(self) -> Iterator[str]:
        if self.new_class_head and not self.initial_weights:
            yield "new_class_head needs initial_weights: without them every head is new"
        if self.auto_resume and self.name is None:
            yield "auto_resume finds the run by its name: set train.name=NAME"
        if self.compile and self.zero_stage == 3:
            yield "compile does not work with zero_stage=3, which fetches weights in between; take 2"


class EvalConfig(Section):
    """Evaluation and prediction."""

    batch_size: int = setting(
        4, "images of one exact size that are evaluated together", unit="images per forward pass", gt=0, le=1024
    )
    top_k: int | None = setting(
        None,
        "most detections, over all queries and classes; by default as many as the set's protocol counts, of COCO and "
        "Open Images 100, of LVIS 300, and 100 for `ddetr predict`",
        unit="detections per image",
        gt=0,
        le=100_000,
    )
    scorer: Literal["hotcoco", "pycocotools"] = setting(
        "hotcoco", "the library that computes the scores; its numbers are those of pycocotools, which is slower"
    )
    ray: str | None = setting(
        None,
        "Ray cluster that evaluates the checkpoints of a run while training goes on: HOST:PORT, ray://HOST:PORT, auto "
        "or local; by default training pauses and the ranks evaluate",
    )
    most_waiting: int = setting(
        4,
        "with ray: the most checkpoints that are kept until they are evaluated; the oldest of more are left out",
        unit="checkpoints",
        gt=0,
        le=1000,
    )
    required: Literal["none", "last", "all"] = setting(
        "last",
        "with ray: which evaluations the end of a run waits for, and fails without; missing ones are always named",
    )
    wait_minutes: float = setting(
        60.0, "with ray: how long the end of a run waits for required evaluations", unit="minutes", ge=0, le=10_000
    )
    workers: int | None = setting(
        None,
        "most workers on Ray that evaluate; by default as many as the cluster's nodes hold. Where a cluster scales "
        "itself, those for which there is no room ask it for nodes",
        unit="Ray workers",
        gt=0,
        le=10_000,
    )
    gpus: float = setting(
        1.0,
        "GPU of each worker on Ray that evaluates; with a fraction several workers share one",
        unit="share of a GPU",
        gt=0,
        le=1,
    )
    score_threshold: float = setting(
        0.4, "confidence threshold: `ddetr predict` draws detections with at least this score", unit="score", ge=0, le=1
    )

    @field_validator("ray")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        if address is not None and not RAY_ADDRESS.fullmatch(address):
            raise ValueError(f"expected HOST:PORT, ray://HOST:PORT, auto or local, got {visible(address)!r}")
        return address


class MonitorConfig(Section):
    """The Prometheus exporter of each rank."""

    enabled: bool = setting(True, "each rank serves its metrics to Prometheus over HTTP")
    host: str = setting("127.0.0.1", "bind address; 0.0.0.0 lets other machines reach it")
    port: int = setting(
        9400, "each rank listens on port + its local rank; 0 takes a free port", unit="TCP port", ge=0, le=65535
    )


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()

    def misfits(self) -> Iterator[str]:
        if self.train.batch_size % self.train.accumulation:
            yield (
                f"train.batch_size must be a multiple of train.accumulation, got {self.train.batch_size} and "
                f"{self.train.accumulation}; {nearest(self.train.batch_size, self.train.accumulation)}"
            )
