"""Which splits are found in a folder that somebody exported, and which images belong to each."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from ddetr.data.formats import read_annotations, read_sets
from ddetr.data.sets import Reading

from tests.data.annotation_table.case import ROW, A, coco, entry, xml

VOC = xml(entry(), filename=None, size="")


def document(*names: str) -> str:
    """A COCO json of images of these names, each with a box."""
    images = [{"id": number, "file_name": name, "width": 100, "height": 80} for number, name in enumerate(names)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 30, 40], "area": 9} for n in range(len(names))]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})


def images(*names: str) -> dict[str, str | bytes]:
    return dict.fromkeys(names, A)


def voc(*names: str) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {f"JPEGImages/{name}.png": A for name in names}
    return files | {f"Annotations/{name}.xml": VOC for name in names}


def yolo(folder: str, name: str) -> dict[str, str | bytes]:
    return {f"{folder}/{name}.png": A, f"{folder}/{name}.txt": ROW}


LISTS = "ImageSets/Main"
NAMES = {"classes.txt": "cat\ndog\n"}
ROOTS = [
    (
        "trainval and test",
        voc("1", "2", "3") | {f"{LISTS}/trainval.txt": "1\n2\n", f"{LISTS}/test.txt": "3\n"},
        {"trainval": {"1.png", "2.png"}, "test": {"3.png"}},
    ),
    (
        "trainval as the union of the others",
        voc("1", "2") | {f"{LISTS}/trainval.txt": "1\n2\n", f"{LISTS}/train.txt": "1\n", f"{LISTS}/val.txt": "2\n"},
        {"train": {"1.png"}, "val": {"2.png"}},
    ),
    (
        "lists in capitals, of other names, beside those of classes",
        voc("1", "2", "3")
        | {f"{LISTS}/Train.txt": "1\n", f"{LISTS}/fold2.txt": "2\r\n3\r\n", f"{LISTS}/cat_train.txt": "1 1\n2 -1\n"},
        {"Train": {"1.png"}, "fold2": {"2.png", "3.png"}},
    ),
    (
        "lists of classes alone",
        voc("a b", "2") | {f"{LISTS}/cat_train.txt": "a b.png 1\n", f"{LISTS}/cat_val.txt": "2.png -1\n"},
        {"train": {"a b.png"}, "val": {"2.png"}},
    ),
    (
        "names that end like flags",
        voc("img", "img 0", "img 1") | {f"{LISTS}/train.txt": "img 1\nimg 0\n", f"{LISTS}/val.txt": "img\n"},
        {"train": {"img 0.png", "img 1.png"}, "val": {"img.png"}},
    ),
    (
        "paths in lists",
        voc("1", "2") | {f"{LISTS}/train.txt": "data/JPEGImages/1.png\n", f"{LISTS}/val.txt": "2\n"},
        {"train": {"1.png"}, "val": {"2.png"}},
    ),
    (
        "xml files in folders of splits, images in one",
        images("images/1.png", "images/2.png") | {"Annotations/train/1.xml": VOC, "Annotations/val/2.xml": VOC},
        {"train": {"1.png"}, "val": {"2.png"}},
    ),
    (
        "a split of another name",
        {"train/1.xml": VOC, "val/2.xml": VOC, "extra/3.xml": VOC, **images("train/1.png", "val/2.png", "extra/3.png")},
        {"train": {"1.png"}, "val": {"2.png"}, "extra": {"3.png"}},
    ),
    (
        "lists of folds",
        voc("1", "2") | {f"{LISTS}/fold1_train.txt": "1\n", f"{LISTS}/fold1_val.txt": "2\n"},
        {"fold1_train": {"1.png"}, "fold1_val": {"2.png"}},
    ),
    (
        "two years of VOC",
        {f"{year}/{name}": content for year in ("VOC2007", "VOC2012") for name, content in voc("1").items()},
        {"VOC2007": {"1.png"}, "VOC2012": {"1.png"}},
    ),
    (
        "folders that are no splits",
        {"x/1.xml": VOC, "y/2.xml": VOC, **images("x/1.png", "y/2.png")},
        {"": {"x/1.png", "y/2.png"}},
    ),
    (
        "two files of one split",
        images("1.png", "2.png")
        | {
            "annotations/annotations_train.json": document("1.png"),
            "annotations/instances_train.json": document("2.png"),
        },
        {"annotations_annotations_train": {"1.png"}, "annotations_instances_train": {"2.png"}},
    ),
    (
        "names that only begin like what stands beside boxes",
        images("1.png", "2.png") | {"stuffed_toys_train.json": document("1.png"), "labels_val.json": document("2.png")},
        {"stuffed_toys_train": {"1.png"}, "val": {"2.png"}},
    ),
    (
        "what stands beside boxes",
        images("1.png")
        | {f"annotations/{n}_val2017.json": document("1.png") for n in ("instances", "captions", "stuff")},
        {"val2017": {"1.png"}},
    ),
    (
        "a json in the root and one below",
        images("1.png", "val/2.png") | {"train.json": document("1.png"), "val/val.json": document("2.png")},
        {"train": {"1.png"}, "val": {"2.png"}},
    ),
    (
        "images in a folder of any name",
        images("pics/1.png") | {"annotations/instances_default.json": document("1.png")},
        {"default": {"1.png"}},
    ),
    (
        "a list after a megabyte of other words",
        images("1.png") | {"a.json": '{"info": "' + "x" * (2 << 20) + '",' + document("1.png")[1:]},
        {"": {"1.png"}},
    ),
    (
        "labels beside the images of each split",
        NAMES | yolo("train", "1") | yolo("val", "2"),
        {"train": {"1.png"}, "val": {"2.png"}},
    ),
    (
        "a third split of another name",
        NAMES
        | images("images/train/1.png", "images/val/2.png", "images/holdout/3.png")
        | dict.fromkeys(("labels/train/1.txt", "labels/val/2.txt", "labels/holdout/3.txt"), ROW),
        {"train": {"1.png"}, "val": {"2.png"}, "holdout": {"3.png"}},
    ),
    (
        "a yaml of another name, beside one that is broken and one of something else",
        {"a.yaml": "{", "b.yaml": "names: [cat]", "c.yaml": "names: [cat, dog]\ntrain: data\n", **yolo("data", "1")},
        {"train": {"1.png"}},
    ),
    (
        "an archive in a folder of its name",
        {f"set/{name}": content for name, content in coco().items()},
        {"": {"a.png"}},
    ),
]


def laid_out(files: Mapping[str, str | bytes], root: Path) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


@pytest.mark.parametrize(("files", "splits"), [row[1:] for row in ROOTS], ids=[row[0] for row in ROOTS])
def test_the_splits_of_a_root_are_found(files: dict, splits: dict, tmp_path: Path) -> None:
    sets = read_sets(laid_out(files, tmp_path / "root"), reading=Reading(workers=1))
    assert {name: {image.file_name for image in found.images} for name, found in sets.items()} == splits
    assert not [finding for found in sets.values() for finding in found.findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("document_of", "image_of", "absent"),
    [
        ("annotations/instances_{}.json", "{}", ""),
        ("annotations/instances_{}2017.json", "images/{}2017", ""),
        ("{}/labels.json", "{}/data", ""),
        ("{}/annotations/instances.json", "{}/images", ""),
        ("{}_annotations.json", "{}", ""),
        ("{}.json", "data/{}/images", ""),
        ("{}.json", "{}_images", ""),
        ("labels/det_{}.json", "images/100k/{}", ""),
        ("annotations/person_keypoints_{}2017.json", "{}2017", ""),
        ("annotations/instances_{}.json", "images/{}", "train"),
        ("annotations/instances_{}.json", "images/{}", "val"),
    ],
)
def test_images_of_one_name_are_those_of_the_split(
    document_of: str, image_of: str, absent: str, tmp_path: Path
) -> None:
    """Both splits have an image 1.png. Without the images of one split, those of the other do not stand for them."""
    files: dict[str, str | bytes] = {}
    for split in ("train", "val"):
        files[document_of.format(split)] = document("1.png")
        files |= images() if split == absent else images(f"{image_of.format(split)}/1.png")
    laid_out(files | images(".thumbs/1.png"), tmp_path)
    if absent:
        with pytest.raises(ValueError, match=rf"instances_{absent}.json: 1.png is in .* called like another split"):
            read_sets(tmp_path)
        (there,) = {"train", "val"} - {absent}
        assert list(read_sets(tmp_path, split=there)) == [there]
        return
    folders = [found.folder.relative_to(tmp_path).as_posix() for found in read_sets(tmp_path).values()]
    assert folders == [image_of.format("train"), image_of.format("val")]


def test_images_of_one_name_in_folders_that_say_nothing_are_asked_for(tmp_path: Path) -> None:
    files = {"annotations/instances_val.json": document("1.png"), **images("x/1.png", "y/1.png")}
    with pytest.raises(ValueError, match=r"1.png is in x, y: name the folder of its images after it, IMAGES"):
        read_sets(laid_out(files, tmp_path))


def test_an_image_in_two_splits_is_said(tmp_path: Path) -> None:
    files = {f"Annotations/{split}/1.xml": VOC for split in ("train", "val")} | images("images/1.png")
    train, val = read_sets(laid_out(files, tmp_path)).values()
    assert "shared image" not in {finding.kind for finding in train.findings}
    assert "shared image" in {finding.kind for finding in val.findings}


def test_an_xml_is_of_no_image_in_another_folder(tmp_path: Path) -> None:
    files = {"cam2/1.xml": VOC, "cam2/2.xml": VOC, **images("cam1/1.png", "cam2/2.png")}
    (found,) = read_sets(laid_out(files, tmp_path)).values()
    assert [image.file_name for image in found.images] == ["cam2/2.png"]
    assert "missing image" in {finding.kind for finding in found.findings}


@pytest.mark.parametrize("other", ["device.json", "training_log.json", "val_predictions.json", "notes/train.json"])
def test_a_json_of_another_kind_is_none_of_a_split(other: str, tmp_path: Path) -> None:
    files = {"instances_train.json": document("1.png"), other: '[{"image_id": 1}]', **images("1.png")}
    assert list(read_sets(laid_out(files, tmp_path))) == ["train"]


@pytest.mark.parametrize("broken", ["", "// mine\n{}", "{"])
def test_a_broken_json_of_a_split_is_an_error(broken: str, tmp_path: Path) -> None:
    files = {"instances_train.json": document("1.png"), "instances_val.json": broken, "package.json": "{}"}
    root = laid_out(files | images("1.png"), tmp_path)
    with pytest.raises(ValueError, match=r"instances_val.json: no COCO json, though it is called like that of a split"):
        read_sets(root)
    (root / "instances_val.json").unlink()
    assert list(read_sets(root)) == ["train"]


def test_a_broken_json_of_a_split_beside_its_images_is_an_error(tmp_path: Path) -> None:
    files = {"train/_annotations.coco.json": document("1.png"), "valid/_annotations.coco.json": ""}
    with pytest.raises(ValueError, match=r"valid/_annotations.coco.json: no COCO json"):
        read_sets(laid_out(files | images("train/1.png", "valid/2.png"), tmp_path))


def test_no_split_is_called_like_the_folder_above(tmp_path: Path) -> None:
    files = {"instances_...json": document("1.png"), "train.json": document("1.png")}
    assert ".." not in read_sets(laid_out(files | images("1.png"), tmp_path), reading=Reading(workers=1))


def test_a_split_that_is_named_but_not_there_is_said(tmp_path: Path) -> None:
    files = {
        "obj.data": "train = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
        "obj.names": "cat\n",
    }
    files |= {"train.txt": "data/obj_train_data/1.png\n", **yolo("obj_train_data", "1")}
    (found,) = read_sets(laid_out(files, tmp_path), reading=Reading(workers=1)).values()
    assert [(finding.kind, finding.what) for finding in found.findings] == [("absent split", "valid: 'data/valid.txt'")]


@pytest.mark.parametrize("kept", ["images/test/3.png", "test/3.png"])
def test_images_of_a_split_without_labels_are_said(kept: str, tmp_path: Path) -> None:
    files = {kept: A, **NAMES}
    if kept.startswith("images"):
        files |= {**images("images/train/1.png"), "labels/train/1.txt": ROW}
    else:
        files |= {**images("train/images/1.png"), "train/labels/1.txt": ROW}
    (found,) = read_sets(laid_out(files, tmp_path)).values()
    assert [(finding.kind, finding.what) for finding in found.findings] == [
        ("absent split", "test: images without labels, left out")
    ]


def test_xml_files_in_no_list_are_said(tmp_path: Path) -> None:
    files = voc("1", "2") | {f"{LISTS}/train.txt": "1\n"}
    (found,) = read_sets(laid_out(files, tmp_path)).values()
    assert [image.file_name for image in found.images] == ["1.png"]
    assert [finding.what for finding in found.findings] == ["1 xml files are in no list of ImageSets/Main: 2.xml"]


def test_one_bad_split_does_not_keep_from_reading_another(tmp_path: Path) -> None:
    files = {"train.json": document("1.png"), "test.json": document()}
    root = laid_out(files | images("1.png"), tmp_path)
    with pytest.raises(ValueError, match=r"no images in it; --split reads one of the others alone: train"):
        read_sets(root)
    assert list(read_sets(root, split="train")) == ["train"]


def test_nothing_is_read_outside_of_a_root(tmp_path: Path) -> None:
    laid_out(yolo("elsewhere", "1"), tmp_path)
    root = laid_out({"data.yaml": "train: ../elsewhere\nnames: [cat]\n"}, tmp_path / "root")
    with pytest.raises(ValueError, match=r"data.yaml: leads to no folder beside it: train: '../elsewhere'"):
        read_sets(root)


def test_a_data_yaml_may_be_named_itself(tmp_path: Path) -> None:
    root = laid_out({"data.yaml": "train: images\nnames: [cat, dog]\n", **yolo("images", "1")}, tmp_path)
    (found,) = read_sets(root / "data.yaml").values()
    assert [image.file_name for image in found.images] == ["1.png"]


OBJ = "train = train.txt\nnames = obj.names\n"
REFUSED: list[tuple[dict[str, str | bytes], str, str]] = [
    ({"data.yaml": "names: [cat]"}, "data.yaml", "no `train` and no `val` in it; expected the data.yaml of a YOLO set"),
    ({"data.yaml": "train: {a: b}"}, "", "data.yaml: train is .*: needs a path or a list of paths"),
    ({"data.yaml": f"train: {'a' * 300}"}, "", "data.yaml: leads to no folder beside it: train: 'aaa"),
    ({"data.yaml": "train: all.txt\nnames: [cat]", "all.txt": "# none\n"}, "", "all.txt: no images in it"),
    ({"data.yaml": "train: all.txt\nnames: [cat]", "all.txt": "data/1.png\n"}, "", "data: no such folder; name the f"),
    ({"data.yaml": "train: images\nnames: [cat]", **images("images/1.png")}, "", "images: no .txt file of labels for"),
    ({"obj.data": OBJ + "# \xe4", **NAMES}, "", "obj.data: it is not text in UTF-8"),
    (
        {"a/train.json": document("1.png"), "a_train.json": document("1.png")},
        "",
        r"two splits of one name in it \(a_tr",
    ),
    (voc("1") | {"labelmap.txt": "cat:1\ncat:2\n"}, "", "labelmap.txt: the class 'cat' is in it twice"),
]


@pytest.mark.parametrize(("files", "path", "message"), REFUSED)
def test_what_leads_to_no_set_is_named(files: dict, path: str, message: str, tmp_path: Path) -> None:
    laid_out(
        {name: text.encode("latin-1") if isinstance(text, str) else text for name, text in files.items()}, tmp_path
    )
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^{tmp_path}.*{message}"):
        read_sets(tmp_path / path)


def test_images_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    root = laid_out({"train.json": document("1.png")}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"photos: no such folder; expected the images that the annotations"):
        read_sets(root / "train.json", root / "photos")


def test_a_link_out_of_a_root_is_not_followed(tmp_path: Path) -> None:
    laid_out(images("elsewhere/1.png"), tmp_path)
    root = laid_out({"labels/1.txt": ROW, **NAMES}, tmp_path / "root")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"root/images leads out of .*root: name the annotations and IMAGES one by one"
    ):
        read_sets(root)


def test_a_listed_image_that_is_not_there_is_said(tmp_path: Path) -> None:
    (found,) = read_sets(laid_out(voc("1") | {f"{LISTS}/train.txt": "1\n2\n"}, tmp_path)).values()
    assert [(finding.kind, finding.what) for finding in found.findings] == [
        ("missing image", "2 is listed, but there is no such image")
    ]


def test_one_set_is_wanted_where_there_are_several(tmp_path: Path) -> None:
    root = laid_out(NAMES | yolo("train", "1") | yolo("val", "2"), tmp_path)
    with pytest.raises(ValueError, match=r"several splits in it, train, val: name one with --split"):
        read_annotations(root, root)


def test_classes_are_not_for_a_json(tmp_path: Path) -> None:
    root = laid_out(NAMES | {"train.json": document("1.png")} | images("1.png"), tmp_path)
    with pytest.raises(
        ValueError, match=r"train.json: a COCO json has its own categories; --classes is for VOC and YOLO"
    ):
        read_sets(root, reading=Reading(classes=root / "classes.txt"))
