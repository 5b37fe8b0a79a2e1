"""Messages about settings that differ between a resumed run and its checkpoint."""

from pathlib import Path
from typing import Any

from ...data.text import visible
from ..config import Config, without_logins
from ..overrides import in_one_line
from ..progress import Position
from .schedule import Schedule

# The weights are there already, and the run stays where it is.
WITHOUT_EFFECT = (
    *("model.pretrained_backbone", "train.initial_weights", "train.new_class_head"),
    *("train.output", "train.name"),
)
UNTOLD = ("train.auto_resume",)
# Of the model, what changes neither what it computes in evaluation nor the shape of a tensor.
TRAINING_ALONE = ("model.dropout", "model.pretrained_backbone")


def changed_settings(before: Config, after: Config) -> dict[str, str]:
    """The settings that differ, each as `before -> after`, without logins."""
    old, new = (without_logins(config.model_dump(mode="json")) for config in (before, after))
    return {
        f"{section}.{key}": f"{_shown(old[section][key])} -> {_shown(new[section][key])}"
        for section, values in new.items()
        for key in values
        if old[section][key] != new[section][key] and f"{section}.{key}" not in UNTOLD
    }


def told_of_changes(before: Config, after: Config, folder: Path, done: Position, per_epoch: int) -> list[str]:
    """Messages for a run in `folder` that has come to `done` under `before` and resumes under `after`.

    per_epoch: steps of an epoch under `after`. A folder that was moved is not reported as a changed setting.
    """
    changed = changed_settings(before, after)
    if after.train.name == folder.name:
        changed.pop("train.name", None)
    if Path(after.train.output).resolve() == folder.resolve().parent:
        changed.pop("train.output", None)
    vain = [key for key in changed if key in WITHOUT_EFFECT]
    model = [key for key in changed if key.startswith("model.") and key not in TRAINING_ALONE]
    others = [key for key in changed if key not in (*vain, *model)]
    lines = []
    if others:
        lines.append(f"settings changed since step {done.step}: " + _listed(changed, others))
    if vain:
        lines.append("without effect, the run goes on with its weights in its folder: " + _listed(changed, vain))
    if model:
        lines.append("the weights fit, but the model computes something else with them: " + _listed(changed, model))
    old_rate = Schedule.of(before.train, done.steps_per_epoch or per_epoch, done).learning_rate(before.optim, done.step)
    new_rate = Schedule.of(after.train, per_epoch, done).learning_rate(after.optim, done.step)
    if old_rate != new_rate:
        lines.append(f"the learning rate of step {done.step + 1} is {new_rate:.3g} and would have been {old_rate:.3g}")
    return lines


def _listed(changed: dict[str, str], keys: list[str]) -> str:
    return ", ".join(f"{key} {changed[key]}" for key in keys)


def _shown(value: Any) -> str:
    return visible(in_one_line(value))
