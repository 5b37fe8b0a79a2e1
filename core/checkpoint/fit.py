"""Whether a file's tensors are those of a model, and what to do where they are not."""

from pathlib import Path

from ...data.text import visible
from ..config import ModelConfig
from ..model.detector import Detector
from ..overrides import written
from .description import contents
from .weights import Shapes, shapes_of

# What the names of all our tensors begin with.
PARTS = ("backbone", "input_proj", "transformer", "query_embed", "class_embed", "bbox_embed")


def check_fit(model: Detector, stored: Shapes, file: Path) -> list[str]:
    """Check tensors of a file against a model; returns the names of those that are no part of any detector of ours.

    Raises ValueError that lists what is missing, unexpected or re-shaped, with the settings to change.
    """
    ours = shapes_of(model.state_dict())
    foreign = [name for name in stored if name.split(".")[0] not in PARTS]
    mistakes = [f"missing: {name}" for name in ours if name not in stored]
    mistakes += [f"unexpected: {name}" for name in stored if name not in ours and name not in foreign]
    mistakes += [
        f"re-shaped: {name} is {stored[name]} in the file, {shape} in the model"
        for name, shape in ours.items()
        if name in stored and stored[name] != shape
    ]
    if mistakes:
        shown = "\n".join(f"  {visible(mistake)}" for mistake in mistakes[:12])
        more = f"\n  and {len(mistakes) - 12} more" if len(mistakes) > 12 else ""
        raise ValueError(
            f"{file}: holds another architecture than the configuration describes; {len(mistakes)} tensor(s) "
            f"differ:\n{shown}{more}\n{_advice(file, model.config, stored)}"
        )
    return foreign


def _advice(file: Path, config: ModelConfig, stored: Shapes) -> str:
    """How to bring a file's weights and a configuration together, from what the file says of itself."""
    if not any(name.split(".")[0] in PARTS for name in stored):
        return "None of its tensors has a name of this detector: it is the checkpoint of another program."
    try:
        theirs = contents(file).config.model
    except ValueError as error:
        return f"It does not say which model it is of ({str(error).splitlines()[0]})."
    differing = [
        written(f"model.{key}", value)
        for key, value in theirs.model_dump(mode="json").items()
        if value != getattr(config, key) and key not in ("pretrained_backbone", "dropout")
    ]
    if differing == [f"model.num_classes={theirs.num_classes}"]:
        return "Only the number of classes differs: start the class heads anew with train.new_class_head=true."
    hint = (
        ", and start the class heads anew with train.new_class_head=true"
        if theirs.num_classes != config.num_classes
        else ""
    )
    wanted = [setting for setting in differing if not setting.startswith("model.num_classes=")]
    if not wanted:
        return "Its own description fits the configuration, so the file was changed or cut after it was written."
    return f"The file is of a model with {' '.join(map(visible, wanted))}: set that{hint}."
