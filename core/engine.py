"""What DeepSpeed needs: the process group, the JSON, the engine, and its part of a checkpoint.

A rank is one process with one device. The environment that torchrun and the DeepSpeed launcher set (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says which; without it a run is one rank.
"""

import datetime
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.categories import Categories
from ..ops.library import UNAVAILABLE
from .checkpoint import WEIGHTS, save_weights, step_directory
from .config import Config, TrainConfig
from .detector import Detector
from .moving_average import MovingAverage
from .optimizer import adamw
from .transfer import to_device
from .transformer import TransformerLayer

log = logging.getLogger("ddetr")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # a rank that waits longer than this for the others gives up
STATE = "state.json"
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
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False
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
    if "stage" in train.deepspeed_extra.get("zero_optimization", {}):
        raise ValueError("train.deepspeed_extra.zero_optimization.stage: set train.zero_stage instead")
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
        names = {id(parameter): name for name, parameter in self._names.items()}
        self._order = [names[id(parameter)] for parameter in trained]  # by which DeepSpeed's files know the parameters
        self._own_norm: float | None = None
        if _clips_itself(config):
            self._optimizer.register_step_pre_hook(self._clip)
        self.run, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=deepspeed_config(config))
        self._copies: dict[int, Tensor] = {}  # DeepSpeed's, in float32, of half-precision weights: stage 0 tells nobody
        if config.train.zero_stage == 0 and config.train.precision != "fp32":
            self._copies = {id(p): copy for p, copy in zip(trained, self._masters(), strict=True)}
        decay = config.train.ema_decay
        self._average = MovingAverage(self._masters(), decay) if decay is not None else None

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

    def _masters(self) -> list[Tensor]:
        """This rank's share of the float32 weights, as the optimizer sees them."""
        if self.config.train.zero_stage == 3:  # there the optimizer's groups are filled for the step only
            return list(cast(Any, self.run.optimizer).fp32_partitioned_groups_flat)
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    def weights(self) -> dict[str, Tensor]:
        """The whole model in float32 on the host of rank 0 (the other ranks get an empty dictionary). Collective."""
        whole: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            full = self._copies[id(parameter)] if id(parameter) in self._copies else _full_parameter(parameter)
            if self.world.rank == 0:
                whole[name] = full.detach().float().cpu()
        return whole | {n: b.cpu() for n, b in self._buffers.items()} if self.world.rank == 0 else {}

    def save(self, run_directory: Path, position: Mapping[str, int], categories: Categories) -> Path:
        """Write a checkpoint aside, then give it its name, so that a named one is always whole. Collective."""
        final = step_directory(run_directory, position["step"])
        partial = final.with_name(f".{final.name}")
        if self.world.rank == 0:
            for leftover in (partial, final):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        self.run.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
        if self._average is not None:
            self._average.save(partial / self._average_file())
        with self._average.in_place_of_weights() if self._average is not None else nullcontext():
            weights = self.weights()  # on a CPU not a copy
            if self.world.rank == 0:
                save_weights(partial / WEIGHTS, weights, self.config, categories, position["step"], position["epoch"])
        if self.world.rank == 0:
            state = {**position, "world_size": self.world.size, "parameters": self._order}
            (partial / STATE).write_text(json.dumps(state))
        dist.barrier()
        if self.world.rank == 0:
            partial.rename(final)
        dist.barrier()
        return final

    def load(self, checkpoint: Path) -> dict[str, int]:
        """Weights, optimizer and loss scale from a checkpoint; returns its position. Collective.

        Raises ValueError when it was written by another number of ranks or ZeRO stage.
        """
        position = json.loads((checkpoint / STATE).read_text())
        written, order = position.pop("world_size"), position.pop("parameters", None)
        if order != self._order:
            raise ValueError(
                f"{checkpoint}: its optimizer state is of other parameters, or another version of ddetr wrote it; "
                f"start from its weights instead: train.initial_weights={checkpoint}"
            )
        if written != self.world.size:
            raise ValueError(
                f"{checkpoint} was written by {written} rank(s); resume it with as many, not {self.world.size}"
            )
        loaded, _ = self.run.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            raise ValueError(f"{checkpoint}: DeepSpeed found no state for ZeRO stage {self.config.train.zero_stage}")
        if self._average is not None:
            self._average.load(checkpoint / self._average_file())
        return position

    def _average_file(self) -> str:
        return f"moving_average_{self.world.rank:05d}.safetensors"


def _clips_itself(config: Config) -> bool:
    """DeepSpeed tells the gradient norm of every combination but this one, so here the clipping is ours."""
    return config.train.zero_stage == 0 and config.train.precision == "fp32"


def _full_parameter(parameter: Tensor) -> Tensor:
    """The float32 master of a parameter wherever ZeRO keeps it, or the parameter itself where there is none."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and (full := safe_get_full_fp32_param(parameter)) is not None:
        return full
    if hasattr(parameter, "ds_id"):  # partitioned by stage 3, but not trained
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def _merged(values: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        nested = isinstance(value, Mapping) and isinstance(values.get(key), dict)
        values[key] = _merged(values[key], value) if nested else value
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
