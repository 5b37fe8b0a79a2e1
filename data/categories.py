"""The categories of a data set: labels 0..K-1 of the model against ids and names of the COCO json."""

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .values import MOST_ID, as_whole, described, member, whole

MOST_ABOVE = 64  # categories that one is a kind of; Open Images has up to five
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent, as LVIS has them


@dataclass(frozen=True)
class Categories:
    """Label k in 0..K-1 stands for the category `ids[k]`, called `names[k]`.

    Ids may be sparse and start anywhere (COCO's are 1..90 with gaps). Raises ValueError for a repeated id.

    frequencies, parents: for the evaluation (`protocols.py`), by id: one of FREQUENCIES; the categories right above.
    Categories are equal without them.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    frequencies: Mapping[int, str] = field(default_factory=dict, compare=False)
    parents: Mapping[int, tuple[int, ...]] = field(default_factory=dict, compare=False)
    _labels: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        labels = {category_id: label for label, category_id in enumerate(self.ids)}
        if len(labels) != len(self.ids):
            repeated = sorted(category_id for category_id, count in Counter(self.ids).items() if count > 1)
            raise ValueError(f"categories: every id must be unique, repeated: {reprlib.repr(repeated)}")
        object.__setattr__(self, "_labels", labels)
        for category_id in self.parents:
            self.above(category_id)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, category_id: object) -> bool:
        return category_id in self._labels

    def label(self, category_id: int) -> int:
        """The label of a category id. Raises ValueError for an id that is not in the set."""
        if category_id not in self._labels:
            raise ValueError(
                f"category id {described(category_id)} is not among the known ones: {list(self.ids)[:200]}"
            )
        return self._labels[category_id]

    def having(self, **attributes: Any) -> "Categories":
        """The same categories with these frequencies or parents."""
        return replace(self, **attributes)

    def above(self, category_id: int) -> list[int]:
        """The category itself and all that it is a kind of, each once, the nearest first.

        Raises ValueError for more than MOST_ABOVE.
        """
        found = {category_id: None}  # a set, in order
        for id_ in (waiting := [category_id]):
            new = [parent for parent in self.parents.get(id_, ()) if parent not in found]
            found |= dict.fromkeys(new)
            waiting += new
            if len(found) > MOST_ABOVE + 1:
                raise ValueError(f"categories: more than {MOST_ABOVE} stand above {category_id}")
        return list(found)

    def to_json(self) -> list[dict[str, Any]]:
        """[{"id": 1, "name": "person"}, ...] in label order: kept in the shards' index and in checkpoints.

        "frequency" and "parents" are there where a category has them.
        """
        items: list[dict[str, Any]] = [{"id": i, "name": name} for i, name in zip(self.ids, self.names, strict=True)]
        for item in items:
            if frequency := self.frequencies.get(item["id"]):
                item["frequency"] = frequency
            if parents := self.parents.get(item["id"]):
                item["parents"] = list(parents)
        return items

    @classmethod
    def from_json(cls, items: Sequence[Mapping[str, Any]]) -> "Categories":
        """The inverse of `to_json`: the order of the list is that of the labels. Raises ValueError for any other."""
        if not isinstance(items, list):
            raise ValueError(f"categories: {described(items)} is no list")
        names = tuple(member(item, "name", str) for item in items)
        ids = tuple(whole(item, "id", -MOST_ID) for item in items)
        frequencies = {item["id"]: member(item, "frequency", str) for item in items if "frequency" in item}
        parents = {item["id"]: tuple(member(item, "parents", list)) for item in items if "parents" in item}
        if bad := [value for value in frequencies.values() if value not in FREQUENCIES]:
            raise ValueError(f"a frequency is {described(bad[0])}, none of {', '.join(FREQUENCIES)}")
        known = set(ids)
        if bad := [above for above in parents.values() if not all(type(i) is int and i in known for i in above)]:
            raise ValueError(f"'parents' is {described(list(bad[0]))}: not ids of categories in the list")
        return cls(ids, names, frequencies, parents)

    @classmethod
    def from_coco(cls, items: Iterable[Mapping[str, Any]]) -> "Categories":
        """The `categories` of a COCO json; labels follow the numerical order of the ids.

        Raises ValueError for an entry without a whole number as id, and for a repeated id.
        """
        items = list(items)
        for item in items:
            if not isinstance(item, Mapping) or as_whole(item.get("id"), -MOST_ID) is None:
                raise ValueError(f'categories: each needs an integer "id", got {described(item)}')
        pairs = [(as_whole(item["id"], -MOST_ID) or 0, item.get("name")) for item in items]
        pairs.sort(key=lambda pair: pair[0])
        texts = [
            name if isinstance(name, str) else str(id_) if name is None else described(name) for id_, name in pairs
        ]
        return cls(tuple(id_ for id_, _ in pairs), tuple(texts))
