"""What training keeps of each parameter, whole and by name, wherever ZeRO has put its parts.

DeepSpeed gives each rank a share of the float32 weights ("masters"), and the optimizer keeps two averages of the same
shape beside them. Here they come together and are dealt out again, so a checkpoint depends on neither the number of
ranks nor the ZeRO stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's, of the gradient and of its square


class TrainingState:
    """The masters of a model in a DeepSpeed engine, and AdamW's state of them.

    parameters: all of the model, by name. trained: those that the optimizer had before the engine took it, in its
    order.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.AdamW,
        parameters: Mapping[str, nn.Parameter],
        trained: Sequence[nn.Parameter],
        stage: int,
    ) -> None:
        self._engine, self._optimizer, self._parameters, self._stage = engine, optimizer, parameters, stage
        self.trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        # Stage 0 keeps float32 copies of half-precision weights, one for each, and tells nobody.
        self._whole = {id(p): m for p, m in zip(trained, self.masters, strict=True)} if stage == 0 else {}

    @property
    def masters(self) -> list[Tensor]:
        """This rank's share of the float32 weights, as the optimizer sees them: it changes them in place."""
        if self._stage == 3:  # there the optimizer's groups are filled for the step only
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    def averages(self, key: str) -> list[Tensor]:
        """One of AVERAGES, beside each master."""
        return [self._state(master)[key] for master in self.masters]

    @property
    def steps(self) -> dict[str, int]:
        """How many steps AdamW has taken for each parameter; it makes up for the averages' beginning at zero."""
        if self._stage == 0:
            return {n: int(self._state(self._whole[id(self._parameters[n])])["step"]) for n in self.trained}
        taken = max(int(self._state(master)["step"]) for master in self.masters)
        return dict.fromkeys(self.trained, taken)

    def set_steps(self, steps: Mapping[str, int]) -> None:
        if self._stage == 0:
            for name in self.trained:
                self._state(self._whole[id(self._parameters[name])])["step"].fill_(steps[name])
        else:
            for master in self.masters:
                self._state(master)["step"].fill_(max(steps.values()))

    @contextmanager
    @torch.no_grad()
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the masters hold other values, one tensor beside each."""
        masters = [master.detach() for master in self.masters]
        weights = [master.clone() for master in masters]
        torch._foreach_copy_(masters, list(values))
        try:
            yield
        finally:
            torch._foreach_copy_(masters, weights)

    def gather(self, names: Iterable[str], *, keep: bool) -> dict[str, Tensor]:
        """What the masters hold of these parameters, whole and float32 on the host; of one not trained, its weights.

        Collective: every rank takes part; where `keep` is false, it gets an empty dictionary.
        """
        whole: dict[str, Tensor] = {}
        for name in names:
            full = self._gathered(self._parameters[name])
            if keep:
                whole[name] = full.detach().to("cpu", torch.float32, copy=True)
        return whole

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if id(parameter) in self._whole:
            return self._whole[id(parameter)]
        if parameter.requires_grad and (full := safe_get_full_fp32_param(parameter)) is not None:
            return full
        if hasattr(parameter, "ds_id"):  # partitioned by stage 3, but not trained
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter

    def deal(self, whole: Mapping[str, Tensor]) -> None:
        """Fill this rank's masters: its part of each trained parameter."""
        for name in self.trained:
            self._deal(cast(Any, self._parameters[name]), whole[name])

    @torch.no_grad()
    def _deal(self, parameter: Any, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self._stage == 0:
            self._whole[id(parameter)].copy_(value)
        elif self._stage == 3:
            # DeepSpeed's own function takes no tensor whose last part is padded.
            part = torch.zeros(parameter.ds_tensor.numel(), device=parameter.device)
            mine = value.flatten()[part.numel() * self._engine.global_rank :][: part.numel()]
            part[: mine.numel()] = mine
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's own, made as AdamW makes it where no step has been taken yet."""
        state = self._optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state |= {key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in AVERAGES}
        return state
