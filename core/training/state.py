"""The training state by parameter (float32 weights, Adam's moments, EMA), gathered from where ZeRO partitioned it.

DeepSpeed gives each rank a share of the float32 weights: flat tensors ("masters"), with several parameters in one. The
optimizer keeps tensors of the same shape for each, its slots (Adam's moments). This module gathers them by
parameter and deals them out again, so a checkpoint depends on neither world size nor ZeRO stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer import state_of
from .world import World


@dataclass(frozen=True)
class Fragment:
    """A run of elements of a parameter, and where it stands on this rank."""

    name: str
    start: int  # in the flattened parameter
    master: int
    offset: int  # in the flattened master
    numel: int


@dataclass(frozen=True)
class Gathered:
    """The fragments of all ranks in rank 0's host memory: a row of fragments in each of `values`; empty elsewhere."""

    shapes: Mapping[str, torch.Size]
    fragments: Sequence[Sequence[Fragment]]
    values: Sequence[Tensor]

    def whole(self) -> dict[str, Tensor]:
        """Each trained parameter's values, float32."""
        whole = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        for fragments, values in zip(self.fragments, self.values, strict=True):
            for fragment, part in zip(fragments, values.split([f.numel for f in fragments]), strict=True):
                _run(whole[fragment.name], fragment.start, fragment.numel).copy_(part)
        return whole


class TrainingState:
    """The masters of a model in a DeepSpeed engine, and the optimizer's state of them. Constructing it is collective.

    parameters: all of the model, by name. trained: those that the optimizer had before DeepSpeed wrapped it, in its
    order. stage: of ZeRO.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        trained: Sequence[nn.Parameter],
        stage: int,
        world: World,
    ) -> None:
        self._engine, self._optimizer, self._stage, self._world = engine, optimizer, stage, world
        names = {id(parameter): name for name, parameter in parameters.items()}
        named = {names[id(parameter)]: parameter for parameter in trained}
        # Under ZeRO stage 3 a parameter has no elements of its own.
        self._shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
        self._fragments = list((self._whole, self._of_groups, self._of_groups, self._of_each)[stage](named))
        self._fragments_of = {name: [f for f in self._fragments if f.name == name] for name in self._shapes}
        self._everyones = world.to_first(self._fragments, list[Fragment]) if stage > 0 else []
        if self._everyones:  # on rank 0
            found = sum(fragment.numel for fragments in self._everyones for fragment in fragments)
            assert found == sum(shape.numel() for shape in self._shapes.values()), "DeepSpeed keeps some elsewhere"

    @property
    def trained(self) -> list[str]:
        return list(self._shapes)

    @property
    def masters(self) -> list[Tensor]:
        """This rank's share of the float32 weights: the tensors that the optimizer changes in place."""
        if self._stage == 3:  # there the optimizer's groups are filled for the step only
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    @property
    def slots(self) -> dict[str, list[Tensor]]:
        """The moments by name ("exp_avg", "exp_avg_sq"): a tensor per master."""
        states = [state_of(self._optimizer, master) for master in self.masters]
        return {slot: [state[slot] for state in states] for slot in states[0] if slot != "step"}

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps taken for each parameter, which AdamW's bias correction depends on."""
        taken = [int(state_of(self._optimizer, master)["step"]) for master in self.masters]
        if self._stage == 0:
            return {fragment.name: taken[fragment.master] for fragment in self._fragments}
        return dict.fromkeys(self._shapes, max(taken))

    def set_steps(self, steps: Mapping[str, int]) -> None:
        """Set the counts that `steps` returns; under ZeRO all parameters get the largest."""
        masters = self.masters
        if self._stage == 0:
            for fragment in self._fragments:
                state_of(self._optimizer, masters[fragment.master])["step"].fill_(steps[fragment.name])
        else:
            for master in masters:
                state_of(self._optimizer, master)["step"].fill_(max(steps.values()))

    def not_finite(self, beside: Sequence[Tensor]) -> list[str]:
        """Parameters of which this rank holds a value that is not finite in `beside`, a tensor per master."""
        finite = torch.stack([tensor.isfinite().all() for tensor in beside]).tolist()
        held = (f for f in self._fragments if not finite[f.master])
        return [f.name for f in held if not bool(_run(beside[f.master], f.offset, f.numel).isfinite().all())]

    def gather(self, beside: Sequence[Tensor]) -> Gathered:
        """Gather `beside`, a tensor per master, from all ranks on rank 0. Collective."""
        parts = [_run(beside[f.master], f.offset, f.numel) for f in self._fragments]
        if self._stage == 0:  # rank 0 has everything
            parts = [part.to("cpu", copy=True) for part in parts] if self._world.rank == 0 else []
            return Gathered(self._shapes, [[fragment] for fragment in self._fragments][: len(parts)], parts)
        mine = torch.cat([torch.empty(0, device=self._world.device), *(part.to(self._world.device) for part in parts)])
        lengths = [sum(fragment.numel for fragment in fragments) for fragments in self._everyones]
        return Gathered(self._shapes, self._everyones, self._world.collect(mine, lengths))

    def deal(self, whole: Iterable[tuple[str, Tensor]], beside: Sequence[Tensor]) -> None:
        """Fill `beside`, a tensor per master, with this rank's fragments of `whole`: (name, values) of parameters."""
        for name, values in whole:
            for f in self._fragments_of.get(name, ()):
                _run(beside[f.master], f.offset, f.numel).copy_(_run(values, f.start, f.numel))

    # Where the fragments are: under stage 0, in stages 1 and 2, and in stage 3.

    def _whole(self, trained: Mapping[str, nn.Parameter]) -> Iterator[Fragment]:
        """A master for each parameter: itself, or a float32 copy of half precision."""
        for number, (name, parameter) in enumerate(trained.items()):
            yield Fragment(name, 0, number, 0, parameter.numel())

    def _of_groups(self, trained: Mapping[str, nn.Parameter]) -> Iterator[Fragment]:
        """The parameters of each of the optimizer's groups in a row, cut once for each rank."""
        for name, parameter in trained.items():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:  # None where this rank has nothing of it
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(name, there.start, mapping.param_group_index, here.start, here.numel)

    def _of_each(self, trained: Mapping[str, nn.Parameter]) -> Iterator[Fragment]:
        """Each parameter cut once for each rank, the last pieces padded."""
        optimizer = self._engine.optimizer
        for name, parameter in trained.items():
            master, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self._world.rank * padded
            if (numel := min(padded, self._shapes[name].numel() - start)) > 0:
                yield Fragment(name, start, master, offset, numel)


def _run(tensor: Tensor, start: int, numel: int) -> Tensor:
    return tensor.detach().view(-1)[start : start + numel]
