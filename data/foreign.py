"""Annotations in the formats of other programs, known by the keys of their json."""

from typing import Any

# The keys of other programs' json, or of the first entry of its list.
FOREIGN_KEYS = (
    ({"score", "bbox", "image_id"}, "a list of detections in COCO's result format"),
    ({"shapes", "imagePath"}, "one image of labelme"),
    ({"data", "annotations"}, "Label Studio's own format"),
    ({"_via_img_metadata"}, "a project of the VGG Image Annotator"),
    ({"assets", "tags"}, "a project of VoTT"),
    ({"image", "annotations"}, "Create ML's format"),
)


def foreign(values: Any) -> str:
    """What a json is instead of COCO's, where it is known by its keys."""
    first = values[0] if isinstance(values, list) and values else values
    keys = set(first) if isinstance(first, dict) else set()
    for known, name in FOREIGN_KEYS:
        if known <= keys:
            return f"; this is {name}: export it as COCO"
    return ""
