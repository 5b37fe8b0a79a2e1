"""A training checkpoint as one value, and the files that hold it.

A checkpoint's folder has three files. model.safetensors is the whole model as it is evaluated, in float32 (its EMA, if
there is one). training.safetensors is the rest of the training state of each trained parameter, as SLOT/PARAMETER:
Adam's moments, and with an EMA the weights. checkpoint.json is the manifest, which lists what is in these two.
Tensors are whole and by parameter, whatever world size and ZeRO stage wrote them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...data.categories import Categories
from ...data.text import shortened, visible
from ...data.values import described, is_number, member, whole
from ..config import Config
from ..model.detector import Detector
from ..model.finite import check_finite
from ..progress import Position
from .description import contents
from .fit import check_fit
from .manifest import MANIFEST, damaged, read_manifest, write_checkpoint
from .weights import WEIGHTS, StoredTensors, save_weights, shapes_of

TRAINING = "training.safetensors"
LONGEST_NAME = 200  # characters of a tensor's name in a message

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Configuration, weights and position of a run, and the rest of its training state.

    weights: the whole model as it is evaluated. averaged: whether that is the EMA; the weights that training resumes
    with are then the slot "weights". slots: tensors of the shape of each trained parameter, such as Adam's moments
    "exp_avg" and "exp_avg_sq". trained: the optimizer's steps of each trained parameter. loss_scale: the state of
    fp16's loss scaling. ranks (world size, 0 if unknown) and zero_stage: of the run that wrote it.
    """

    folder: Path
    position: Position
    config: Config
    categories: Categories
    weights: Tensors
    averaged: bool
    slots: Mapping[str, Tensors]
    trained: Mapping[str, int]
    loss_scale: Mapping[str, Any]
    ranks: int
    zero_stage: int

    def write(self) -> None:
        """Write it into `folder`: whole or, with an OSError, not at all."""
        position = self.position
        kept = {f"{slot}/{name}": tensor for slot, tensors in self.slots.items() for name, tensor in tensors.items()}

        def write(folder: Path) -> None:
            save_weights(folder / WEIGHTS, self.weights, self.config, self.categories, position.step, position.epochs)
            save_file(kept, folder / TRAINING)

        values = asdict(position) | {
            "model": "average" if self.averaged else "weights",
            "slots": list(self.slots),
            "trained": dict(self.trained),
            "loss_scale": dict(self.loss_scale),
            "ranks": self.ranks,
            "zero_stage": self.zero_stage,
        }
        needed = sum(tensor.nbytes for tensor in (*self.weights.values(), *kept.values()))
        write_checkpoint(self.folder, needed, write, values)

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read manifest and headers; a tensor is read when it is asked for.

        Raises ValueError as `read_manifest` and `contents` do, and when something that a resume needs is missing.
        """
        values = read_manifest(folder)
        if unlisted := [name for name in (WEIGHTS, TRAINING) if name not in values["files"]]:
            raise ValueError(damaged(folder, f"{MANIFEST} does not list {unlisted[0]}"))
        kept = StoredTensors(folder / TRAINING)
        try:
            if values["version"] == 1:
                values = _as_listed_now(values, kept)
            position = _position(values)
            counts, loss_scale = (member(values, name, dict) for name in ("trained", "loss_scale"))
            if bad := [value for value in loss_scale.values() if not (type(value) is bool or is_number(value))]:
                raise ValueError(f"'loss_scale' holds {described(bad[0])}")
            if (kind := member(values, "model", str)) not in ("weights", "average"):
                raise ValueError(f"'model' is {described(kind)}")
            slots, there = member(values, "slots", list), {name.partition("/")[0] for name in kept.shapes}
            if bad := [slot for slot in slots if not isinstance(slot, str) or slot not in there]:
                raise ValueError(f"'slots' holds {described(bad[0])}, of which {TRAINING} has nothing")
            if not slots or len(set(slots)) < len(slots):
                raise ValueError(f"'slots' is {described(slots)}")
            if kind == "average" and "weights" not in values["slots"]:
                raise ValueError("'slots' lists no 'weights' to train on with, and 'model' is their average")
            trained = {name: whole(counts, name) for name in counts}
            ranks, zero_stage = whole(values, "ranks"), whole(values, "zero_stage")
        except ValueError as error:
            what = f"{MANIFEST} lacks what a resume needs ({visible(str(error))})"
            raise ValueError(damaged(folder, what)) from error
        slots = {slot: kept.under(f"{slot}/") for slot in values["slots"]}
        found = contents(folder / WEIGHTS)
        if found.categories is None:
            raise ValueError(damaged(folder, f"{WEIGHTS} was not written by ddetr"))
        for name in trained:
            if (shape := found.shapes.get(name)) is None:
                lacks = shortened(visible(name), LONGEST_NAME)
                raise ValueError(damaged(folder, f"{WEIGHTS} has no {lacks}, which was trained"))
            if bad := [slot for slot, tensors in slots.items() if tensors.shapes.get(name) != shape]:
                lacks = shortened(visible(f"{bad[0]}/{name}"), LONGEST_NAME)
                raise ValueError(damaged(folder, f"{TRAINING} has no {lacks} of shape {shape}"))
        return cls(
            folder=folder,
            position=position,
            config=found.config,
            categories=found.categories,
            weights=found.weights,
            averaged=kind == "average",
            slots=slots,
            trained=trained,
            loss_scale=loss_scale,
            ranks=ranks,
            zero_stage=zero_stage,
        )

    def check_fit(self, model: Detector) -> None:
        """Raise ValueError that lists the differing tensors if it is of another architecture. Reads no tensor."""
        shapes = self.weights.shapes if isinstance(self.weights, StoredTensors) else shapes_of(self.weights)
        check_fit(model, shapes, self.folder / WEIGHTS)

    def fill(self, model: Detector) -> None:
        """Load the weights that training resumes with. Raises ValueError as `check_fit`, and for one not finite."""
        self.check_fit(model)
        constant = {name: self.weights[name] for name in model.state_dict() if name not in self.trained}
        check_finite(constant, self.folder / WEIGHTS)
        model.load_state_dict(constant | dict(self.beside("weights")))

    def beside(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each trained parameter: its "weights" to resume with, their "average" (EMA), or a slot.

        One tensor is read at a time. Raises ValueError for a kind that it has not, and a value that is not finite.
        """
        in_model = kind == ("average" if self.averaged else "weights")
        if not in_model and kind not in self.slots:
            raise ValueError(
                f"{self.folder} has no {kind!r} of its trained parameters, only {described(list(self.slots))}; start "
                f"from its weights instead: train.initial_weights={self.folder}"
            )
        tensors = self.weights if in_model else self.slots[kind]
        for name in self.trained:
            tensor = tensors[name]
            check_finite({name: tensor}, self.folder / (WEIGHTS if in_model else TRAINING))
            yield name, tensor


def position_of(folder: Path) -> Position:
    """The progress of the run when it wrote this checkpoint. Raises ValueError as `read_manifest`."""
    values = read_manifest(folder)
    if values["version"] == 1:
        values = _as_listed_now(values, StoredTensors(folder / TRAINING))
    return _position(values)


def _position(values: Mapping[str, Any]) -> Position:
    numbers = {name: whole(values, name) for name in ("step", "epochs", "step_in_epoch", "steps_per_epoch")}
    return Position(**numbers, order=member(values, "order", str))


def _as_listed_now(values: Mapping[str, Any], kept: StoredTensors) -> dict[str, Any]:
    """A manifest of version 1 (first release) as one of version 2. Its slots are the prefixes of the tensors' names.

    Raises ValueError that names what it lacks.
    """
    slots = list(dict.fromkeys(name.partition("/")[0] for name in kept.shapes))
    if not slots:
        raise ValueError(f"{TRAINING} has no state of the optimizer")
    trained, average = member(values, "optimizer_steps", dict), member(values, "moving_average", bool)
    model = "average" if average else "weights"
    epochs = whole(values, "epoch")
    now = {"order": "", "ranks": 0, "zero_stage": 0, **values, "epochs": epochs}
    if "steps_per_epoch" not in values:  # before steps could be parts of an epoch
        step, in_epoch = whole(values, "step"), whole(values, "step_in_epoch")
        now["steps_per_epoch"] = (step - in_epoch) // epochs if epochs else 0
    return now | {"model": model, "slots": slots, "trained": trained}
