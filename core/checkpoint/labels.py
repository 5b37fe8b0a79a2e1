"""Fine-tuning on other categories: rows of the class heads follow the names of the categories, whatever their order.

Shapes: K classes. Row k of a class head's weight (K, C) and bias (K) belongs to label k; softmax heads have one more
row, "no object", the last.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...data.categories import Categories
from ...data.text import visible
from ..config import ModelConfig


@dataclass(frozen=True)
class LabelMap:
    """For each label of the run, the label of the weights that it continues; None for one that starts from scratch."""

    names: tuple[str, ...]  # of the run's labels
    old_labels: tuple[int | None, ...]
    num_old: int

    def __str__(self) -> str:
        kept = [n for k, n in enumerate(self.names) if self.old_labels[k] == k]
        moved = [n for k, n in enumerate(self.names) if self.old_labels[k] not in (k, None)]
        anew = [n for k, n in enumerate(self.names) if self.old_labels[k] is None]
        parts = [
            f"{len(kept)} kept",
            f"{len(moved)} moved" + _listed(moved),
            f"{len(anew)} started anew" + _listed(anew),
        ]
        left = self.num_old - len(kept) - len(moved)
        return f"classes by name: {', '.join(parts)}, {left} of the weights' left out"

    @property
    def is_identity(self) -> bool:
        return self.old_labels == tuple(range(self.num_old))

    def rows(self, stored: Tensor, fresh: Tensor, softmax: bool) -> Tensor:
        """A class head's tensor for the run's labels, (K, ...): stored rows, and `fresh` ones where there are none."""
        rows = fresh.detach().clone()
        for label, old in enumerate(self.old_labels):
            if old is not None:
                rows[label] = stored[old]
        if softmax:
            rows[-1] = stored[-1]
        return rows


def label_map(old: Categories, new: Categories) -> LabelMap:
    """Match categories by name; a name that has several ids in one of the sets only by id and name together."""
    several = {name for names in (old.names, new.names) for name, count in Counter(names).items() if count > 1}
    by_name = {name: label for label, name in enumerate(old.names) if name not in several}
    by_both = {both: label for label, both in enumerate(zip(old.ids, old.names, strict=True))}
    found = (
        by_both.get((category_id, name)) if name in several else by_name.get(name)
        for category_id, name in zip(new.ids, new.names, strict=True)
    )
    return LabelMap(new.names, tuple(found), len(old))


def continued_heads(
    stored: dict[str, Tensor], ours: dict[str, Tensor], config: ModelConfig, labels: LabelMap, where: object
) -> dict[str, Tensor]:
    """The tensors of the class heads, by our names, for the run's labels.

    The last head of a two-stage model keeps its rows in place: its row 0 stands for any object (section 4.2).
    Raises ValueError, naming `where`, when a head has another number of rows than the stored categories need.
    """
    heads = {}
    of_proposals = f"class_embed.{config.decoder_layers}." if config.two_stage else None
    same_place = tuple(k if k < labels.num_old else None for k in range(len(labels.names)))
    softmax = config.classification == "softmax"
    for name, fresh in ours.items():
        if not name.startswith("class_embed.") or name not in stored or stored[name].shape[1:] != fresh.shape[1:]:
            continue
        if len(stored[name]) != labels.num_old + softmax:
            raise ValueError(
                f"{where}: {name} has {len(stored[name])} rows, but the file names {labels.num_old} classes: it was "
                "changed after it was written; start the class heads anew with train.new_class_head=true"
            )
        by_place = of_proposals is not None and name.startswith(of_proposals)
        by = LabelMap(labels.names, same_place, labels.num_old) if by_place else labels
        heads[name] = fresh if fresh.is_meta else by.rows(stored[name], fresh, softmax)
    return heads


def check_shared(labels: LabelMap, old: Categories, where: object, tell: Callable[[str], None]) -> None:
    """Tell what becomes of the classes, unless all stay in place. Raises ValueError when the sets share none."""
    if all(label is None for label in labels.old_labels):
        raise ValueError(
            f"{where}: none of its classes{_listed(old.names)} is a class of the shards{_listed(labels.names)}; start "
            f"the class heads anew with train.new_class_head=true"
        )
    if not labels.is_identity:
        tell(str(labels))


def check_same(stored: Categories | None, shards: Categories, checkpoint: object, location: object) -> None:
    """Raise ValueError when the shards of a resumed run have other categories than its checkpoint."""
    if stored is None or stored == shards:
        return
    differing = [
        f"label {label} is {a} in the checkpoint and {b} in the shards"
        for label, (a, b) in enumerate(zip(_described(stored), _described(shards), strict=False))
        if a != b
    ]
    if len(stored) != len(shards):
        differing.append(f"the checkpoint has {len(stored)} categories, the shards {len(shards)}")
    raise ValueError(
        f"the categories of the shards {location} are not those of {checkpoint}: {'; '.join(differing[:4])}"
        + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
        + f". Resume on shards with its categories, or begin a run with train.initial_weights={checkpoint}, which "
        "takes the classes by name"
    )


def check_evaluable(
    shards: Categories, location: object, known: Mapping[int, str | None], where: str, path: object, remedy: str
) -> None:
    """Raise ValueError when a category of the shards is not a known one, under the same id and name.

    known: names by id in `where` ("the checkpoint") at `path`; None: any name. It may hold more than the shards.
    remedy: ends the message.
    """
    wrong = [
        f"{described} is " + (f"{visible(str(known[id_]))!r} in {where}" if id_ in known else f"not in {where}")
        for described, id_, name in zip(_described(shards), shards.ids, shards.names, strict=True)
        if id_ not in known or known[id_] not in (None, name)
    ]
    if wrong:
        there = [f"id {id_}" if name is None else f"{visible(name)!r} (id {id_})" for id_, name in known.items()]
        raise ValueError(
            f"the categories of the shards {location} and of {where} {path} do not correspond: {_several(wrong)}; "
            f"there are {_several(there)}. {remedy}"
        )


def _described(categories: Categories) -> list[str]:
    return [f"{visible(name)!r} (id {i})" for i, name in zip(categories.ids, categories.names, strict=True)]


def _several(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return f" ({_several([visible(name) for name in names])})" if names else ""
