"""DeepSpeed: its configuration JSON, the engine around the detector, and the engine's state in a checkpoint."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from ...data.categories import Categories
from ..checkpoint.codec import Checkpoint
from ..checkpoint.weights import step_directory
from ..config import Config
from ..model.detector import Detector
from ..model.transformer import TransformerLayer
from ..progress import Position
from .average import MovingAverage
from .optimizer import adamw, check_trained, freeze_without_rate
from .state import TrainingState
from .world import World

log = logging.getLogger("ddetr")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The state of fp16's dynamic loss scaling; ZeRO stage 0 has no hysteresis.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# Gradient elements reduced at once. DeepSpeed's default of 500 million is a buffer of gigabytes on each GPU, and never
# full: with the 40 million parameters of these models the first reduction would wait for the last gradient.
BUCKET_ELEMENTS = 10_000_000

# Keys of the DeepSpeed JSON that follow from our configuration, and where to set each instead.
_MODELLED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "the optim section",
    "scheduler": "optim.drop_epochs and optim.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
}


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of a configuration.

    Raises ValueError when train.deepspeed_extra sets what another setting decides, or an offload to NVMe or MiCS
    shards, which checkpoints cannot gather.
    """
    train = config.train
    for key in train.deepspeed_extra:
        if key in _MODELLED:
            raise ValueError(f"train.deepspeed_extra.{key}: set {_MODELLED[key]} instead")
    zero = train.deepspeed_extra.get("zero_optimization", {})
    if "stage" in zero:
        raise ValueError("train.deepspeed_extra.zero_optimization.stage: set train.zero_stage instead")
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            raise ValueError(
                f"train.deepspeed_extra.zero_optimization.{part}.device=nvme: checkpoints cannot gather what is there; "
                "take cpu"
            )
    if zero.get("mics_shard_size", -1) > 0:
        raise ValueError(
            "train.deepspeed_extra.zero_optimization.mics_shard_size: checkpoints cannot gather such parts"
        )
    values: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": 0.0 if _clips_itself(config) else config.optim.clip_norm,
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": BUCKET_ELEMENTS},
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16", "initial_scale_power": 16},
        "steps_per_print": 2**31,  # the trainer reports each step itself
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs where DeepSpeed offloads to
    }
    return _merged(values, train.deepspeed_extra)


class Engine:
    """The DeepSpeed engine around the detector, and the EMA of its weights. Constructing it is collective.

    `run` is DeepSpeed's own engine: call it for the forward pass, then `run.backward`, then `step` of this class.
    Frozen parameters and buffers are kept in addition to it, as they are before mixed precision rounds them.
    """

    def __init__(self, model: Detector, config: Config, world: World) -> None:
        import deepspeed

        self.config, self.world = config, world
        self.dtype = DTYPES[config.train.precision]
        freeze_without_rate(model, config.optim)
        self._names = dict(model.named_parameters())
        frozen = {name: parameter for name, parameter in self._names.items() if not parameter.requires_grad}
        # What never changes, before half precision rounds it and ZeRO stage 3 partitions it.
        self._constant = {name: t.detach().clone() for name, t in (*frozen.items(), *model.named_buffers())}
        layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
        for layer in layers:
            layer.keeps_activations = not config.train.checkpoint_activations
        if config.train.compile:
            for module in (model.backbone.body, *layers):
                module.compile(dynamic=True)
        self._optimizer = adamw(model, config.optim)  # DeepSpeed wraps it and keeps its groups
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        # In mixed precision DeepSpeed makes its float32 weights from the rounded half-precision ones.
        exact = {
            n: p.detach().clone() for n, p in self._names.items() if p.requires_grad and self.dtype != torch.float32
        }
        self._own_norm: float | None = None
        if _clips_itself(config):
            self._optimizer.register_step_pre_hook(self._clip)
        self.run, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=deepspeed_config(config))
        self._state = TrainingState(self.run, self._optimizer, self._names, trained, config.train.zero_stage, world)
        if exact:
            self._state.deal(exact.items(), self._state.masters)
        decay = config.train.ema_decay
        self._average = MovingAverage(self._state.masters, decay) if decay is not None else None

    def step(self, number: int) -> bool:
        """End a micro-batch; after the last one of a step, take optimizer step `number`, from 1, and update the EMA.

        False: the step was skipped on all ranks, because a gradient on one of them is not finite.
        """
        last_micro_batch, before = self.run.is_gradient_accumulation_boundary(), self.run.skipped_steps
        self.run.step()
        taken = self.run.skipped_steps == before
        if self._average is not None and last_micro_batch and taken:
            self._average.update(number)
        return taken

    def set_learning_rate(self, base: float) -> None:
        """Set the learning rate of each parameter group: `base` times the group's scale."""
        for group in self._optimizer.param_groups:
            group["lr"] = base * group["scale"]

    @property
    def gradient_norm(self) -> float:
        """Of the last optimizer step over all ranks, before gradient clipping."""
        norm = self.run.get_global_grad_norm() if self._own_norm is None else self._own_norm
        assert norm is not None, "asked before the first step"
        return float(norm)

    @property
    def loss_scale(self) -> float:
        """Factor on the loss in the backward pass: fp16's loss scaling; 1 in other precisions."""
        return float(cast(Any, self.run.optimizer).loss_scale) if self.config.train.precision == "fp16" else 1.0

    def _clip(self, optimizer: Any, *_: object) -> None:
        limit = self.config.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._names.values(), limit)
        optimizer.found_inf = (~norm.isfinite()).float()  # AdamW's own way to leave everything as it is
        self._own_norm = float(norm)
        optimizer.overflow = not math.isfinite(self._own_norm)  # DeepSpeed's way to be told so

    def snapshot(self, run_directory: Path, position: Position, categories: Categories) -> Callable[[], Path]:
        """Gather all that a checkpoint holds in rank 0's host memory. Collective.

        Returns a function that writes the checkpoint, on rank 0 and at any time later: whole or, with an OSError, not
        at all. Raises FloatingPointError on all ranks when a weight, a moment or the EMA of some rank is not finite,
        because no run can resume from there.
        """
        state = self._state
        beside = self._beside
        bad = [f"{kind} of {name}" for kind, tensors in beside.items() for name in state.not_finite(tensors)]
        if everyones := self.world.gather(bad[:1], str):
            raise FloatingPointError(
                f"step {position.step}: the {everyones[0]} is not finite, so it is not saved; the checkpoints "
                f"before it are unharmed. Resume with a lower optim.learning_rate, or with optim.clip_norm"
            )
        gathered = {kind: state.gather(tensors) for kind, tensors in beside.items()}
        steps, averaged, constant = state.steps, self._average is not None, self._constant
        loss_scale = {name: value for name, value in vars(self._scaler).items() if name in LOSS_SCALE}

        def written() -> Path:
            slots = {kind: values.whole() for kind, values in gathered.items()}
            weights = slots.pop("average" if averaged else "weights")
            checkpoint = Checkpoint(
                folder=step_directory(run_directory, position.step),
                position=position,
                config=self.config,
                categories=categories,
                weights=weights | {name: value.cpu() for name, value in constant.items()},
                averaged=averaged,
                slots=slots,
                trained=steps,
                loss_scale=loss_scale,
                ranks=self.world.size,
                zero_stage=self.config.train.zero_stage,
            )
            checkpoint.write()
            return checkpoint.folder

        return written

    def load(self, stored: Checkpoint) -> Position:
        """Load moments, EMA and loss scale of a checkpoint, whose weights the model has already; returns its position.

        The checkpoint may be of another world size and ZeRO stage. Raises ValueError when it is of other parameters,
        lacks the EMA that this run keeps, or holds a value that is not finite.
        """
        state = self._state
        check_trained(state.trained, stored.trained, stored.folder)
        for kind, tensors in self._beside.items():
            if kind != "weights":
                state.deal(stored.beside(kind), tensors)
        state.set_steps(stored.trained)
        vars(self._scaler).update({n: v for n, v in stored.loss_scale.items() if n in vars(self._scaler)})
        return stored.position

    @property
    def _beside(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds of the trained parameters: weights, moments and EMA, each a tensor per master."""
        beside = {"weights": self._state.masters} | self._state.slots
        return beside if self._average is None else beside | {"average": self._average.values}

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's object with the state of fp16's loss scaling; an empty one in other precisions."""
        if self.config.train.precision != "fp16":
            return SimpleNamespace()
        optimizer = cast(Any, self.run.optimizer)
        return optimizer.loss_scale_config if self.config.train.zero_stage == 0 else optimizer.loss_scaler


def _clips_itself(config: Config) -> bool:
    """Whether gradient clipping is ours: DeepSpeed reports the gradient norm in every combination but this one."""
    return config.train.zero_stage == 0 and config.train.precision == "fp32"


def _merged(values: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        nested = isinstance(value, Mapping) and isinstance(values.get(key), dict)
        values[key] = _merged(values[key], value) if nested else value
    return values
