"""The configuration: its sections and settings, their defaults and what fits together.

Reading and checking it as a whole: core/config.py.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..data.config import DataConfig
from ..data.location import Location
from ..data.text import visible

LONGEST_NAME = 200  # bytes of train.name, which other names are made from; file systems take 255


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The detector (Deformable DETR, section 4 and appendix A.4). The defaults are the published ones."""

    architecture: Literal["deformable_detr", "detr"] = "deformable_detr"
    backbone: str = Field(default="resnet50.tv_in1k", description="any timm model that supports features_only")
    pretrained_backbone: bool = True
    backbone_norm: Literal["frozen_batch", "group"] = Field(
        default="frozen_batch", description="frozen_batch needs pretrained weights; group trains from scratch"
    )
    dilation: bool = Field(default=False, description="C5 at stride 16 instead of 32 (the published DC5)")
    hidden_dim: int = Field(default=256, gt=0, le=4096)
    heads: int = Field(default=8, gt=0, le=1024)
    levels: int = Field(default=4, ge=1, le=16)
    points: int = Field(default=4, ge=1, le=256)
    multi_scale_attention: bool = Field(
        default=True, description="false: a token of the encoder sees its own level only (the paper's table 2)"
    )
    encoder_layers: int = Field(default=6, ge=1, le=128)
    decoder_layers: int = Field(default=6, ge=1, le=128)
    feedforward_dim: int = Field(default=1024, gt=0, le=65536)
    queries: int = Field(default=300, gt=0, le=100_000)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    box_refine: bool = False
    two_stage: bool = False
    proposal_size: float = Field(
        default=0.05,
        gt=0,
        lt=0.99,
        description="side of the first stage's boxes on the finest level, in image sides; doubles with each level",
    )
    num_classes: int = Field(default=80, gt=0, le=1_000_000)
    classification: Literal["sigmoid", "softmax"] = Field(
        default="sigmoid", description='sigmoid: focal loss; softmax: cross entropy with "no object" (DETR)'
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim must be a multiple of heads, got {self.hidden_dim} and {self.heads}")
        if self.hidden_dim % 32:
            raise ValueError(f"hidden_dim must be a multiple of 32 (the norm's groups), got {self.hidden_dim}")
        if self.levels == 2:
            raise ValueError("levels must be 1 (C5 alone) or at least 3 (C3, C4, C5 and stride-2 levels), got 2")
        if self.dilation and self.levels > 1:
            raise ValueError(f"dilation is for one level, C5 (the published DC5), got levels={self.levels}")
        if self.architecture == "detr" and (self.levels > 1 or self.box_refine or self.two_stage):
            raise ValueError("architecture=detr has levels=1 and neither box_refine nor two_stage")
        if self.architecture == "deformable_detr" and self.classification == "softmax":
            raise ValueError("classification=softmax is DETR's; Deformable DETR has classification=sigmoid")
        if not self.multi_scale_attention and self.levels == 1:
            raise ValueError("multi_scale_attention=false is for several levels, got levels=1")
        if self.two_stage and not self.box_refine:
            raise ValueError("two_stage needs box_refine=true (the published two-stage model builds on refinement)")
        if self.pretrained_backbone and self.backbone_norm == "group":
            raise ValueError("backbone_norm=group has no pretrained weights; set pretrained_backbone=false")
        return self


class OptimConfig(_Section):
    """AdamW, parameter groups, losses and schedule (section 5, implementation details)."""

    learning_rate: float = Field(default=2e-4, gt=0)
    backbone_multiplier: float = Field(default=0.1, ge=0, description="rate of the backbone; 0 freezes it")
    sampling_multiplier: float = Field(default=0.1, gt=0, description="rate of sampling offsets and reference points")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0)
    clip_norm: float = Field(default=0.1, ge=0, description="largest gradient norm; 0 does not clip")
    schedule: Literal["step", "linear"] = Field(
        default="step", description="step drops at drop_epochs; linear falls to zero over the last 40 % of the run"
    )
    drop_epochs: tuple[int, ...] = Field(
        default=(40,), description="step: epochs after which the rate is divided by ten"
    )
    warmup_steps: int = Field(default=0, ge=0)
    class_weight: float = Field(default=2.0, ge=0)
    l1_weight: float = Field(default=5.0, ge=0)
    giou_weight: float = Field(default=2.0, ge=0)
    focal_alpha: float = Field(default=0.25, ge=0, le=1)
    focal_gamma: float = Field(default=2.0, ge=1, description="below 1 its gradient is not finite for sure answers")
    no_object_weight: float = Field(default=0.1, gt=0, le=1, description='weight of "no object" under softmax (DETR)')


class TrainConfig(_Section):
    """One training run and how DeepSpeed executes it."""

    output: Location = Field(default=Location("runs"), description="folder in which the run's own folder is made")
    name: str | None = Field(default=None, description="the run's own folder; by default the time of its start")
    auto_resume: bool = Field(
        default=False, description="with name: continue the run of that name if it has a checkpoint; for launchers"
    )
    initial_weights: Location | None = Field(
        default=None, description="checkpoint to start from: a run, a safetensors file or a published checkpoint"
    )
    new_class_head: bool = Field(
        default=False, description="with initial_weights: class heads of another number of classes start anew"
    )
    epochs: int = Field(default=50, gt=0)
    max_steps: int | None = Field(default=None, gt=0, description="stop after this many optimizer steps")
    batch_size: int = Field(default=32, gt=0, description="images per optimizer step over all ranks")
    accumulation: int = Field(default=1, gt=0, description="forward and backward passes per optimizer step")
    seed: int = Field(default=42, ge=0)
    rank_timeout_seconds: float = Field(
        default=60, gt=0, description="a rank of which nothing is heard so long is lost: the others stop and name it"
    )
    collective_timeout_seconds: float = Field(
        default=1800, gt=0, description="when no rank gets any further for so long, all stop and say where they are"
    )
    bandwidth_test_seconds: float = Field(
        default=2, ge=0, description="how long the ranks exchange data before the first step, to see how fast; 0: not"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(
        default=0, ge=0, description="CPU threads per rank; 0 shares this machine's cores among its ranks"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    compile: bool = Field(default=False, description="torch.compile for the backbone and each transformer layer")
    checkpoint_activations: bool = Field(
        default=False, description="compute a transformer layer again for its backward pass instead of keeping it"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="evaluate and export a moving average of the weights (0.9997, say)"
    )
    most_skipped_steps: int = Field(
        default=10, gt=0, description="stop after so many steps in a row whose loss or gradient is not finite"
    )
    deepspeed_extra: dict[str, Any] = Field(default_factory=dict, description="merged into the DeepSpeed JSON")
    checkpoint_every_epochs: int = Field(
        default=1, ge=0, description="besides the ones before an evaluation and at the end"
    )
    checkpoint_every_steps: int | None = Field(default=None, gt=0, description="within an epoch")
    keep_checkpoints: int = Field(
        default=0, ge=0, description="newest ones that stay, besides the one with the best score (AP); 0 keeps all"
    )
    evaluate_every_epochs: int = Field(default=1, ge=0, description="0 never evaluates while training")
    log_every_steps: int = Field(default=10, gt=0)

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
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"DeepSpeed reads JSON, which has no such value ({error}); text needs quotes") from error
        return extra

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        if self.new_class_head and not self.initial_weights:
            raise ValueError("new_class_head needs initial_weights: without them every head is new")
        if self.auto_resume and self.name is None:
            raise ValueError("auto_resume finds the run by its name: set train.name=NAME")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile does not work with zero_stage=3, which fetches weights in between; take 2")
        return self


class EvalConfig(_Section):
    """Evaluation and prediction."""

    batch_size: int = Field(default=4, gt=0, le=1024, description="images of one exact size per forward pass")
    top_k: int = Field(
        default=100, gt=0, le=100_000, description="most detections of an image, over all queries and classes"
    )
    score_threshold: float = Field(default=0.4, ge=0, le=1, description="least score that `ddetr predict` draws")


class MonitorConfig(_Section):
    """The Prometheus exporter of each rank."""

    enabled: bool = True
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(
        default=9400, ge=0, le=65535, description="rank r on a host listens on port + r; 0 takes a free port"
    )


class Config(_Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.train.batch_size % self.train.accumulation:
            raise ValueError(
                f"train.batch_size must be a multiple of train.accumulation, "
                f"got {self.train.batch_size} and {self.train.accumulation}"
            )
        return self
