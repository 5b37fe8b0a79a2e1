"""`ddetr predict`: detections in image files, as JSON and drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..core.checkpoint import TrainedDetector, load_detector
from ..core.checkpoint.published import published_categories
from ..core.evaluation.evaluator import category_ids
from ..core.evaluation.scores import most_detections
from ..core.model.postprocess import Detections, detections
from ..core.training.world import device_for
from ..data.batch import collate, normalised
from ..data.documents import as_json
from ..data.files import write_whole
from ..data.images import load_upright, read_file
from ..data.text import file_name, visible
from ..data.transforms import evaluation_sample
from .console import brief, progress_bar, say
from .drawing import DrawnBox, draw_boxes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def predict(checkpoint: Path, images: list[Path], output: Path, overrides: list[str]) -> Path:
    """Detect objects in the images; folders stand for the image files in them.

    Writes output/predictions.json with the eval.top_k best detections of each image, and one drawn image each with
    those of at least eval.score_threshold. Returns the path of the JSON.

    Raises FileNotFoundError before anything is written for an image that does not exist, and ValueError after the
    other images are done that names every image that could not be read; FloatingPointError that names those for which
    the model gave numbers that are not finite.
    """
    files = _image_files(images)
    drawn_names = _drawn_names(files)
    detector = load_detector(checkpoint, overrides=overrides)
    device = device_for(detector.config.train, local_rank=0)
    detector.model.to(device)
    names = category_names(detector)
    entries: list[dict[str, Any]] = []
    unreadable: list[str] = []
    not_finite: list[str] = []
    with progress_bar() as progress:
        for file, drawn_name in progress.track(list(zip(files, drawn_names, strict=True)), description="predicting"):
            try:
                pixels = load_upright(read_file(file), most_pixels=detector.config.data.most_pixels)
            except (ValueError, OSError) as error:
                unreadable.append(visible(f"{file}: {error}"))
                continue
            found = detect_image(detector, pixels, device)
            rows = _rows(found, detector, names)
            output.mkdir(parents=True, exist_ok=True)
            boxes = [
                DrawnBox(row["box_xyxy"], f"{brief(row['name'])} {row['score']:.2f}", label)
                for row, label in zip(rows, found.labels.tolist(), strict=True)
                if row["score"] >= detector.config.eval.score_threshold
            ]
            draw_boxes(Image.fromarray(pixels), boxes[::-1]).save(output / drawn_name, quality=92)
            height, width = pixels.shape[:2]
            entries.append(
                {"file": str(file), "height": height, "width": width, "drawn": drawn_name, "detections": rows}
            )
            if found.num_not_finite:
                not_finite.append(visible(f"{file}: {found.num_not_finite} queries"))
    json_file = output / "predictions.json"
    if entries:
        content = {"checkpoint": str(detector.path), "step": detector.step, "images": entries}
        write_whole(json_file, as_json(content, indent=1).encode())
        say(f"{len(entries)} image(s): {json_file} and drawn images beside it")
    if unreadable:
        raise ValueError(f"{len(unreadable)} of {len(files)} image(s) could not be read:\n" + "\n".join(unreadable))
    if not_finite:
        raise FloatingPointError(
            f"{len(not_finite)} of {len(files)} image(s) gave infinities or NaN, which detect nothing: "
            f"{detector.path} has diverged, or its numbers overflow\n" + "\n".join(not_finite)
        )
    return json_file


@torch.inference_mode()
def detect_image(detector: TrainedDetector, pixels: Any, device: torch.device) -> Detections:
    """The detections of one RGB image (height, width, 3) uint8, best first, on the CPU."""
    batch = collate([evaluation_sample(pixels, detector.config.data)]).batch().to(device)
    predictions = detector.model(normalised(batch.images, batch.padding_mask), batch.padding_mask)
    found = detections(predictions, batch.original_sizes, most_detections(detector.config.eval, "coco"))[0]
    return replace(found, scores=found.scores.cpu(), labels=found.labels.cpu(), boxes_xyxy=found.boxes_xyxy.cpu())


def category_names(detector: TrainedDetector) -> tuple[str, ...]:
    """One name a label. A published checkpoint brings none: those with 91 classes are COCO's, others stay numbers."""
    if detector.categories is not None:
        return detector.categories.names
    classes = detector.config.model.num_classes
    published = published_categories(classes)
    return tuple(map(str, range(classes))) if published is None else published.names


def _rows(found: Detections, detector: TrainedDetector, names: tuple[str, ...]) -> list[dict[str, Any]]:
    ids = category_ids(detector.categories, found.labels).tolist()
    labels, scores, boxes = found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist()
    return [
        {"category_id": id_, "name": names[label], "score": score, "box_xyxy": box}
        for id_, label, score, box in zip(ids, labels, scores, boxes, strict=True)
    ]


def _image_files(images: list[Path]) -> list[Path]:
    files: list[Path] = []
    for image in images:
        if image.is_dir():
            inside = sorted(path for path in image.iterdir() if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"{image}: no image files in this folder ({', '.join(SUFFIXES)})")
            files += inside
        elif image.is_file():
            files.append(image)
        else:
            raise FileNotFoundError(f"{image}: no such image")
    return files


def _drawn_names(files: list[Path]) -> list[str]:
    """A file name for each drawn image: the source's, numbered where two sources have the same, cut where too long."""
    names: dict[str, None] = {}  # a set, in order
    for file in files:
        suffix = file.suffix.lower() if file.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        name, number = file_name(file.stem, f"_detections{suffix}"), 1
        while name in names:
            number += 1
            name = file_name(file.stem, f"_{number}_detections{suffix}")
        names[name] = None
    return list(names)
