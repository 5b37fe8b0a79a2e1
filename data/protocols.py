"""The evaluation protocol of a set: its name, and what it takes of annotations beside boxes.

LVIS labels an image for some categories only: `neg_category_ids` are known to be absent from it, of
`not_exhaustive_category_ids` some objects have no box; each category has a frequency. Open Images has its classes in a
hierarchy, and the same first list (image-level labels). Both are kept with the shards; COCO has none of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

from .categories import FREQUENCIES, Categories
from .findings import Finding
from .values import MOST_ID, as_whole, described, member

ProtocolName = Literal["coco", "lvis", "openimages"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
SPELLED: dict[ProtocolName, str] = {"coco": "COCO", "lvis": "LVIS", "openimages": "Open Images"}
IMAGE_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
LISTS: dict[ProtocolName, tuple[str, ...]] = {"coco": (), "lvis": IMAGE_LISTS, "openimages": IMAGE_LISTS[:1]}
_GROUP_OF = ("is_group_of", "IsGroupOf")


def protocol_in(values: Mapping[str, Any]) -> ProtocolName:
    """The protocol that an untrusted file names; COCO's where it names none. Raises ValueError for an unknown one."""
    name = values.get("protocol", "coco")
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise ValueError(f"protocol {described(name)} is none that this release knows: {', '.join(PROTOCOLS)}")
    return cast(ProtocolName, name)


def recognised(images: Iterable[Any], annotations: Iterable[Any]) -> ProtocolName:
    """The protocol of a COCO json by what it holds: lists of an image are LVIS', with boxes around groups Open Images'.

    Groups alone are not enough: without lists, the protocol would count no detection of a class that has no box.
    """
    if not any(isinstance(entry, dict) and any(name in entry for name in IMAGE_LISTS) for entry in images):
        return "coco"
    groups = any(isinstance(entry, dict) and any(name in entry for name in _GROUP_OF) for entry in annotations)
    return "openimages" if groups else "lvis"


def with_attributes(
    categories: Categories, items: Iterable[Any], protocol: ProtocolName, findings: list[Finding]
) -> Categories:
    """The categories with what the protocol takes of them: their frequency, or the categories right above them."""
    stated = {as_whole(item["id"], -MOST_ID): item for item in items} if protocol != "coco" else {}
    names = dict(zip(categories.ids, categories.names, strict=True))
    if protocol == "lvis":
        frequencies = {id_: stated[id_].get("frequency") for id_ in categories.ids}
        for id_, value in frequencies.items():
            if value not in FREQUENCIES:
                what = f"frequency {described(value)} is none of {', '.join(FREQUENCIES)}"
                findings.append(Finding("missing frequency", f"category {names[id_]}", what, "warning"))
        return categories.having(frequencies={id_: value for id_, value in frequencies.items() if value in FREQUENCIES})
    if protocol == "openimages":
        ids = {name: id_ for id_, name in names.items()}
        above = {id_: stated[id_].get("supercategory") for id_ in categories.ids}
        listed = {id_: value if isinstance(value, list) else [value] for id_, value in above.items()}
        parents = {
            id_: tuple(ids[name] for name in found if isinstance(name, str) and ids.get(name, id_) != id_)
            for id_, found in listed.items()
        }
        return categories.having(parents={id_: found for id_, found in parents.items() if found})
    return categories


def lists_of(
    entry: Any, where: str, protocol: ProtocolName, categories: Categories, findings: list[Finding]
) -> dict[str, list[int]]:
    """The lists of categories that a protocol takes of an image's entry, without ids that are not in the set."""
    found: dict[str, list[int]] = {}
    for name in LISTS[protocol]:
        value = entry.get(name)
        ids = [as_whole(item, -MOST_ID) for item in value] if isinstance(value, list) else []
        found[name] = [id_ for id_ in ids if id_ is not None and id_ in categories]
        if value is None:
            findings.append(Finding("missing list", where, f"no {name}; taken: an empty list", "warning"))
        elif not isinstance(value, list) or None in ids:
            findings.append(Finding("bad entry", where, f"{name} {described(value)} is no list of whole numbers"))
        elif unknown := sorted({id_ for id_ in ids if id_ is not None} - set(found[name])):
            findings.append(Finding("unknown category", where, f"{name} lists {described(unknown)}"))
    return found


def lists_in(values: Any) -> dict[str, list[int]]:
    """The lists of an image in a shard, where it has them. Raises ValueError for what is no list of whole numbers."""
    found = {name: member(values, name, list) for name in IMAGE_LISTS if name in values}
    for name, ids in found.items():
        if not all(type(id_) is int and -MOST_ID <= id_ <= MOST_ID for id_ in ids):
            raise ValueError(f"{name!r} is {described(ids)}, not a list of whole numbers")
    return found
