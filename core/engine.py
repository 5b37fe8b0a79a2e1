"""What DeepSpeed needs: the process group, the JSON, the engine, and its part of a checkpoint.

A rank is one process with one device. The environment that torchrun and the DeepSpeed launcher set (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says which; without it a run is one rank.
"""

import datetime
import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ..data.categories import Categories
from ..ops.library import UNAVAILABLE
from .checkpoint import TRAINING, WEIGHTS, load_parameters, save_weights, step_directory
from .config import Config, TrainConfig
from .detector import Detector
from .manifest import read_manifest, write_checkpoint
from .moving_average import MovingAverage
from .optimizer import adamw
from .training_state import AVERAGES, TrainingState
from .transfer import to_device
from .transformer import TransformerLayer

log = logging.getLogger("ddetr")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What fp16's loss scale depends on; stage 0 has no hysteresis.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# Gradients reduced at once. DeepSpeed's 500 million would be a buffer of gigabytes on each GPU, and never full:
# with the 40 million of these models the first reduction would wait for the last gradient.
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


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks, on this rank's device; in place when they are there already."""
        values = values if values.device == self.device else to_device(values, self.device)
        dist.all_reduce(values)
        return values

    def gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all ranks as one, rank after rank."""
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, mine)
        return [item for items in everywhere for item in items]

    def agree(self, choose: Callable[[], Any]) -> Any:
        """Rank 0's choice on every rank; its ValueError or OSError on every rank as well."""
        choice: list[Any] = [None]
        if self.rank == 0:
            try:
                choice = [choose()]
            except (ValueError, OSError) as error:
                choice = [error]
        dist.broadcast_object_list(choice, src=0)
        if isinstance(choice[0], Exception):
            raise choice[0]
        return choice[0]


def device_for(config: TrainConfig, local_rank: int) -> torch.device:
    """Raises ValueError when a GPU is asked for and there is none for this rank."""
    count = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(
            f"train.device={config.device} needs a GPU for local rank {local_rank}, but torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}) sees {count} on {socket.gethostname()}; start at most one rank per GPU, "
            f"set train.device=cpu, or run `ddetr doctor`"
        )
    return torch.device("cuda", local_rank)


def join(config: TrainConfig) -> World:
    """Join the process group that the launcher describes, or make one of a single rank.

    Raises ValueError for a GPU that is not there or half precision that the device cannot compute in, OSError when
    the attention op is not built for the device.
    """
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        environment["MASTER_PORT"] = str(_free_port())
        os.environ.update(environment)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = device_for(config, local_rank)
    if device.type in UNAVAILABLE:
        raise OSError(f"the attention op cannot run on {device.type}: {UNAVAILABLE[device.type]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_size))

    if device.type == "cpu":  # a CUDA toolkit without a GPU is nothing to warn of
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ["DS_ACCELERATOR"] = device.type  # before the import: DeepSpeed chooses once
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    assert accelerator is not None
    if config.precision == "fp16" and not accelerator.is_fp16_supported():
        raise ValueError(f"train.precision=fp16 needs a GPU; on this {device.type} use bf16 or fp32")
    if device.type == "cpu":
        # All that DeepSpeed would compile on a machine's first run, for minutes, is a sum of tensors for inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Later than core/heartbeat.py, which also says who is missing.
    patience = datetime.timedelta(seconds=config.collective_timeout_seconds + 2 * config.rank_timeout_seconds)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=patience, verbose=False
    )
    return World(rank, size, local_rank, device)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that follows from the configuration.

    Raises ValueError when train.deepspeed_extra sets what another key of the configuration decides.
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
    """The DeepSpeed engine around the detector, the weights' moving average, the buffers that half precision rounds.

    `run` is deepspeed's own engine: call it for the forward pass, then `run.backward`, then `step` of this class.
    """

    def __init__(self, model: Detector, config: Config, world: World) -> None:
        import deepspeed

        self.config, self.world = config, world
        self.dtype = DTYPES[config.train.precision]
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # frozen norms: never change
        self._names = dict(model.named_parameters())
        layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
        for layer in layers:
            layer.keeps_activations = not config.train.checkpoint_activations
        if config.train.compile:
            for module in (model.backbone.body, *layers):
                module.compile(dynamic=True)
        self._optimizer = adamw(model, config.optim)  # DeepSpeed wraps it and keeps its groups
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self._own_norm: float | None = None
        if _clips_itself(config):
            self._optimizer.register_step_pre_hook(self._clip)
        self.run, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=deepspeed_config(config))
        self._state = TrainingState(self.run, self._optimizer, self._names, trained, config.train.zero_stage)
        decay = config.train.ema_decay
        self._average = MovingAverage(self._state.masters, decay) if decay is not None else None

    def step(self, number: int) -> bool:
        """The optimizer step `number`, from 1, of all gradients since the last one; whether it took place.

        It does not, on any rank, when a gradient on one of them is not finite.
        """
        last_micro_batch, before = self.run.is_gradient_accumulation_boundary(), self.run.skipped_steps
        self.run.step()
        taken = self.run.skipped_steps == before
        if self._average is not None and last_micro_batch and taken:
            self._average.update(number)
        return taken

    def set_learning_rate(self, base: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = base * group["scale"]

    @property
    def gradient_norm(self) -> float:
        """Of the last optimizer step, before clipping."""
        norm = self.run.get_global_grad_norm() if self._own_norm is None else self._own_norm
        assert norm is not None, "asked before the first step"
        return float(norm)

    @property
    def loss_scale(self) -> float:
        return float(cast(Any, self.run.optimizer).loss_scale) if self.config.train.precision == "fp16" else 1.0

    def _clip(self, optimizer: Any, *_: object) -> None:
        limit = self.config.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._names.values(), limit)
        optimizer.found_inf = (~norm.isfinite()).float()  # AdamW's own way to leave everything as it is
        self._own_norm = float(norm)
        optimizer.overflow = not math.isfinite(self._own_norm)  # DeepSpeed's way to be told so

    def snapshot(self, run_directory: Path, position: Mapping[str, int], categories: Categories) -> Callable[[], Path]:
        """Copy all that a checkpoint holds to rank 0's memory. Collective.

        What it returns writes the checkpoint, on rank 0 and at any time later: whole or, with an OSError, not at all.
        """
        state, mine = self._state, self.world.rank == 0
        weights = state.gather(self._names, keep=mine)
        training: dict[str, Tensor] = {}
        for key in AVERAGES:
            with state.holding(state.averages(key)):
                training |= {f"{key}/{name}": value for name, value in state.gather(state.trained, keep=mine).items()}
        if self._average is not None:  # what is evaluated and exported, but not what training goes on with
            training |= {f"weights/{name}": weights[name] for name in state.trained if mine}
            with state.holding(self._average.values):
                weights |= state.gather(state.trained, keep=mine)
        values = {
            **position,
            "optimizer_steps": state.steps,
            "moving_average": self._average is not None,
            "loss_scale": {name: value for name, value in vars(self._scaler).items() if name in LOSS_SCALE},
            "ranks": self.world.size,
            "zero_stage": self.config.train.zero_stage,
        }
        final = step_directory(run_directory, position["step"])

        def write(folder: Path) -> None:
            whole = weights | {name: buffer.cpu() for name, buffer in self._buffers.items()}
            save_weights(folder / WEIGHTS, whole, self.config, categories, position["step"], position["epoch"])
            save_file(training, folder / TRAINING)

        needed = sum(tensor.nbytes for tensor in (*weights.values(), *training.values()))

        def written() -> Path:
            write_checkpoint(final, needed, write, values)
            return final

        return written

    def load(self, checkpoint: Path) -> dict[str, int]:
        """The optimizer's state, the float32 weights, their average and the loss scale; returns the position.

        It may have been written by another number of ranks and another ZeRO stage. Raises ValueError when it is of
        other parameters.
        """
        values = read_manifest(checkpoint)
        state = self._state
        if set(values["optimizer_steps"]) != set(state.trained):
            raise ValueError(
                f"{checkpoint}: its optimizer state is of other parameters; start from its weights instead: "
                f"train.initial_weights={checkpoint}"
            )
        beside = {key: state.averages(key) for key in AVERAGES}
        if self._average is not None:
            beside["average"] = self._average.values
        for key, tensors in beside.items():
            state.deal(load_parameters(checkpoint, key))
            torch._foreach_copy_(tensors, [master.detach() for master in state.masters])
        state.deal(load_parameters(checkpoint, "weights"))
        state.set_steps(values["optimizer_steps"])
        vars(self._scaler).update({n: v for n, v in values["loss_scale"].items() if n in vars(self._scaler)})
        return {name: values[name] for name in ("step", "epoch", "step_in_epoch")}

    @property
    def _scaler(self) -> Any:
        """Where DeepSpeed keeps fp16's loss scale; nothing in other precisions."""
        if self.config.train.precision != "fp16":
            return SimpleNamespace()
        optimizer = cast(Any, self.run.optimizer)
        return optimizer.loss_scale_config if self.config.train.zero_stage == 0 else optimizer.loss_scaler


def _clips_itself(config: Config) -> bool:
    """DeepSpeed tells the gradient norm of every combination but this one, so here the clipping is ours."""
    return config.train.zero_stage == 0 and config.train.precision == "fp32"


def _merged(values: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        nested = isinstance(value, Mapping) and isinstance(values.get(key), dict)
        values[key] = _merged(values[key], value) if nested else value
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
