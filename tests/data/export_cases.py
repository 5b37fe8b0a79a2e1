"""Which export lies where in tests/data/exports, what it calls its images, and how exactly it says their boxes."""

from dataclasses import dataclass, field
from pathlib import Path

from tests.data.export_truth import PICTURES

LABEL_STUDIO = {  # an upload gets a prefix, and its space is replaced
    "a b.jpg": "1a2b3c4d-a_b.jpg",
    "img_1.JPG": "3456789a-img_1.JPG",
    "empty.png": "4e81b4e7-empty.png",
    "2.png": "68acf134-2.png",
    "dusk.jpg": "82d82d81-dusk.jpg",
}
ROBOFLOW = {
    "a b.jpg": "a-b_jpg.rf.3f1c0a7be0d24c5f9a6b8e7d1c2f4a50.jpg",
    "img_1.JPG": "img_1_JPG.rf.9b2d4e6f8a0c1e3f5a7b9c1d3e5f7a91.jpg",
    "empty.png": "empty_png.rf.0123456789abcdef0123456789abcdef.jpg",
    "2.png": "2_png.rf.77aa55cc33ee11ff00dd22bb44996688.jpg",
    "dusk.jpg": "dusk_jpg.rf.c0ffee00c0ffee00c0ffee00c0ffee00.jpg",
}
TACO = {  # the numbers start again in each batch
    "a b.jpg": "batch_1/000001.jpg",
    "img_1.JPG": "batch_1/000002.JPG",
    "empty.png": "batch_1/000003.jpg",
    "2.png": "batch_2/000001.jpg",
    "dusk.jpg": "batch_2/000002.jpg",
}
VOC2007 = {name: f"{number:06d}.jpg" for number, name in zip((5, 7, 9, 12, 16), PICTURES, strict=True)}
ALL_JPEG = {name: f"{Path(name).stem}.jpg" for name in PICTURES}  # labelme2voc writes the images anew
IN_FOLDER = {"2.png": "sub/2.png"}

EXACT = 1e-6  # pixels
SIX_DIGITS = 1e-4  # shares of the image with six decimals: 64 pixels * 0.75e-6
FIVE_DIGITS = 1e-3
FOUR_DIGITS = 1e-2
CUT_OFF = 1.01  # corners that the tool cut to whole pixels, or to 1


@dataclass(frozen=True)
class Case:
    """An export, and what has to come out of it.

    folder: below tests/data/exports; below: the part of it that is given to the reader.
    images: where an image lies below the folder, of {part} and {name}; with `elsewhere` in a folder of its own.
    parts: what the layout calls the two parts, or the one that holds all images.
    unions: lists of both parts, which may come out as parts of their own.
    names: what the images are called, where not as in PICTURES.
    tolerance: pixels. marks: the one difficult object or crowd is known. own_classes: each part numbers its own.
    without: images that were not exported.
    """

    folder: str
    images: str = "images/{name}"
    parts: tuple[str, ...] = ("",)
    below: str = "."
    unions: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    tolerance: float = EXACT
    marks: bool = False
    elsewhere: bool = False
    own_classes: bool = False
    without: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[str]:
        """The names in PICTURES of the images that the export has."""
        return [name for name in PICTURES if name not in self.without]

    def place(self, name: str) -> str:
        """Where the image of that name in PICTURES lies."""
        part = self.parts[-1] if PICTURES[name].part == "valid" else self.parts[0]
        return self.images.format(part=part, name=self.stored(name))

    def stored(self, name: str) -> str:
        """What the export calls the image of that name in PICTURES."""
        return self.names.get(name, name)

    def __str__(self) -> str:
        return f"{self.folder}{'/' + self.below if self.below != '.' else ''}{'+images' if self.elsewhere else ''}"


TRAIN_VAL = ("train", "val")
TRAIN_VALID = ("train", "valid")
DATUMARO = "datumaro-1.13.12"
FIFTYONE = "fiftyone-1.22.1"
SDK = "label-studio-sdk-2.1.2"

CASES = [
    Case(f"{DATUMARO}/coco", "images/{part}/{name}", TRAIN_VAL, names=IN_FOLDER),
    Case(f"{DATUMARO}/coco_instances_default", "images/default/{name}", names=IN_FOLDER),
    Case(f"{DATUMARO}/coco_instances_default", "{name}", names=IN_FOLDER, elsewhere=True),
    Case(f"{DATUMARO}/voc", "JPEGImages/{name}", TRAIN_VAL, names=IN_FOLDER, marks=True),
    Case(
        f"{DATUMARO}/voc_detection_default",
        "JPEGImages/{name}",
        names=IN_FOLDER,
        marks=True,
    ),
    Case(
        f"{DATUMARO}/voc_detection_without_size",
        "JPEGImages/{name}",
        TRAIN_VAL,
        names=IN_FOLDER,
        marks=True,
    ),
    Case(f"{DATUMARO}/yolo", "obj_{part}_data/{name}", TRAIN_VAL, names=IN_FOLDER, tolerance=SIX_DIGITS),
    Case(f"{DATUMARO}/yolo_default", "obj_train_data/{name}", ("train",), names=IN_FOLDER, tolerance=SIX_DIGITS),
    Case(f"{DATUMARO}/yolo_ultralytics", "images/{part}/{name}", TRAIN_VAL, names=IN_FOLDER, tolerance=SIX_DIGITS),
    Case(f"{FIFTYONE}/coco", "data/{name}", marks=True),
    Case(f"{FIFTYONE}/coco_own_classes", "{part}/data/{name}", TRAIN_VAL, marks=True, own_classes=True),
    # It cuts 24.99... to 24, so a far corner may be one pixel short, whatever the base.
    Case(f"{FIFTYONE}/voc", "data/{name}", tolerance=CUT_OFF, marks=True),
    Case(f"{FIFTYONE}/yolov4", "data/{name}", tolerance=SIX_DIGITS),
    Case(f"{FIFTYONE}/yolov5", "images/{part}/{name}", TRAIN_VAL, tolerance=SIX_DIGITS),
    Case("globox-2.9.0/coco", "{name}", elsewhere=True),
    Case("globox-2.9.0/pascal_voc"),
    # The tool fails for an image without objects.
    Case("imgann-0.8.1/coco", "{name}", elsewhere=True, without=("empty.png",)),
    Case("imgann-0.8.1/voc", "{name}", elsewhere=True),
    # Coordinates below 1 become 1: a box at the border is a pixel smaller, in both formats.
    Case("labelImg-1.8.6/PascalVOC", "{name}", tolerance=CUT_OFF, marks=True),
    Case("labelImg-1.8.6/YOLO", "{name}", tolerance=CUT_OFF),
    Case("label-studio-converter-0.0.59/COCO", names=LABEL_STUDIO),
    # It writes no xml for an image without objects, and no list of images.
    Case(f"{SDK}/VOC", names=LABEL_STUDIO, without=("empty.png",)),
    Case(f"{SDK}/YOLO_WITH_IMAGES", names=LABEL_STUDIO),
    Case(f"{SDK}/YOLO_WITH_IMAGES", "{name}", names=LABEL_STUDIO, elsewhere=True),
    Case("labelme-6.3.1/labelme2voc", "JPEGImages/{name}", names=ALL_JPEG),
    Case("labelme2coco-0.2.6/coco", "photos/{name}"),
    Case("pylabel-0.1.55/voc", "{name}", elsewhere=True),
    Case("pylabel-0.1.55/yolov5", "training/images/{part}/{name}", TRAIN_VAL, tolerance=FOUR_DIGITS),
    Case("pylabel-0.1.55/yolov5", "training/images/{part}/{name}", TRAIN_VAL, "training", tolerance=FOUR_DIGITS),
    Case("sahi-0.12.8/coco", "{name}", TRAIN_VAL, elsewhere=True),
    Case("sahi-0.12.8/yolo", "{part}/{name}", TRAIN_VAL),
    Case("supervision-0.31.2/coco", "{part}/{name}", TRAIN_VALID),
    Case("supervision-0.31.2/coco_single"),
    Case("supervision-0.31.2/pascal_voc"),
    Case("supervision-0.31.2/yolo", "{part}/images/{name}", TRAIN_VALID, tolerance=FIVE_DIGITS),
    Case("handmade/label-studio-windows", names=LABEL_STUDIO),
    Case("handmade/roboflow-coco", "{part}/{name}", TRAIN_VALID, names=ROBOFLOW),
    Case("handmade/roboflow-voc", "{part}/{name}", TRAIN_VALID, names=ROBOFLOW),
    Case("handmade/roboflow-yolov8", "{part}/images/{name}", TRAIN_VALID, names=ROBOFLOW),
    Case("handmade/taco", "{name}", names=TACO),
    Case("handmade/ultralytics-coco", "images/{part}2017/{name}", TRAIN_VAL, tolerance=SIX_DIGITS),
    Case(
        "handmade/VOCdevkit",
        "VOC2007/JPEGImages/{name}",
        TRAIN_VAL,
        "VOC2007",
        unions=("trainval",),
        names=VOC2007,
        marks=True,
    ),
    Case("handmade/vott-voc", "JPEGImages/{name}", TRAIN_VAL),
]
