"""The splits of a set in a folder that some program exported: train, val, test, or one without a name.

Known are the layouts of Roboflow, ultralytics, CVAT, Label Studio, VoTT, labelImg, VOCdevkit, TACO, COCO itself, and of
the libraries that convert between them (tests/data/exports lists what was tried).
"""

import contextlib
from pathlib import Path

from .documents import parse_json
from .foreign import foreign
from .image_files import IMAGE_SUFFIXES, files_in, folders_in, is_inside
from .images import read_file
from .openimages import is_boxes
from .parts_coco import MOST_LOOKED_AT_BYTES, coco_parts, lone_coco
from .parts_voc import voc_parts
from .parts_yolo import darknet_parts, yaml_parts, yaml_root, yolo_parts
from .sets import Part

_OF_SETS = {".json", ".xml", ".yaml", ".yml", ".data", ".txt", ".names", *IMAGE_SUFFIXES}


def find_parts(path: Path, images: Path | None = None, split: str | None = None) -> list[Part]:
    """Find the splits of a set at `path`: a json or CSV, a folder of xml or txt files, or the root of an export.

    split: the only one that is going to be read; the others' images need not be there.
    Raises FileNotFoundError where there is nothing that can be read, ValueError for a data.yaml that leads nowhere.
    """
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        return yaml_parts(path)
    if path.suffix.lower() == ".csv" and path.is_file():
        if images is None:
            raise FileNotFoundError(f"{path}: name the folder of its images after it, IMAGES")
        return [Part("", "openimages", path, images)]
    if not path.is_dir():
        return [Part("", "coco", path, images)] if images else [lone_coco(path)]
    if images is not None and images.resolve() != path.resolve():
        parts = coco_parts(path, images, split) or voc_parts(path, images) or yolo_parts(path, images)
    else:
        root = _innermost(path)
        parts = yaml_root(root) or darknet_parts(root) or coco_parts(root, None, split) or voc_parts(root, None)
        parts = parts or yolo_parts(root, None)
        for place in (place for part in parts for place in (part.images, part.annotations)):
            if not place.exists():
                raise FileNotFoundError(f"{place}: no such folder; name the folder of the images after {path}, IMAGES")
            if not is_inside(path, place):
                raise ValueError(f"{place} leads out of {path}: name the annotations and IMAGES one by one")
    if not parts:
        raise FileNotFoundError(
            f"{path}: neither a COCO json nor VOC .xml nor YOLO .txt files in it{_instead(path)}; name a COCO json or "
            "a folder of these, and the folder of the images (a folder of shards holds its images: leave out IMAGES)"
        )
    if len({part.name for part in parts}) < len(parts):
        names = ", ".join(part.name for part in parts)
        raise ValueError(f"{path}: two splits of one name in it ({names}): name the annotations and IMAGES one by one")
    return parts


def _instead(root: Path) -> str:
    """What a json in the folder is, where that is known."""
    for file in files_in(root):
        if is_boxes(file):
            return f" ({file.name} holds boxes of Open Images: name it, and IMAGES after it)"
        if file.suffix.lower() == ".json" and file.stat().st_size < MOST_LOOKED_AT_BYTES:
            with contextlib.suppress(ValueError, OSError):
                if what := foreign(parse_json(read_file(file))):
                    return f" ({file.name}{what})"
    return ""


def _innermost(root: Path) -> Path:
    """A folder that holds nothing of a set but one more folder is that one, as archives are unpacked."""
    while True:
        folders = folders_in(root)
        texts = (file for file in files_in(root) if not file.name.lower().startswith(("readme", "license")))
        if len(folders) != 1 or any(file.suffix.lower() in _OF_SETS for file in texts):
            return root
        if folders[0].name in ("images", "labels", "Annotations", "annotations"):
            return root
        root = folders[0]
