"""Class heads between sets of categories."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.labels import check_same, label_map
from ddetr.core.checkpoint.published import export_published, published_categories
from ddetr.core.checkpoint.trained import load_weights
from ddetr.core.checkpoint.weights import WEIGHTS, save_weights
from ddetr.core.config import Config, ModelConfig
from ddetr.core.model.detector import Detector, build
from ddetr.data.categories import Categories

OLD = Categories(ids=(1, 2, 3), names=("cat", "dog", "cow"))
NEW = Categories(ids=(4, 5, 6, 7), names=("cow", "dog", "emu", "cat"))
FROM = (2, 1, None, 0)  # of OLD, for each of NEW


def detector(num_classes: int, seed: int, **changes: object) -> tuple[Config, Detector]:
    values = {"backbone": "test_resnet.r160_in1k", "pretrained_backbone": False, "hidden_dim": 64, "queries": 7}
    values |= {"encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 32, "num_classes": num_classes}
    config = Config(model=ModelConfig.model_validate(values | changes))
    torch.manual_seed(seed)
    model = build(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_()
    return config, model


VARIANTS = {
    "plain": {},
    "two_stage": {"box_refine": True, "two_stage": True},
    "detr": {"architecture": "detr", "levels": 1, "classification": "softmax"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_class_goes_on_under_its_name(variant: dict, tmp_path: Path) -> None:
    config, old = detector(3, 1, **variant)
    save_weights(tmp_path / WEIGHTS, old.state_dict(), config, OLD, step=1, epochs=0)
    _, model = detector(4, 2, **variant)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[str] = []
    load_weights(model, tmp_path / WEIGHTS, categories=NEW, tell=told.append)
    assert told == ["classes by name: 1 kept, 2 moved (cow, cat), 1 started anew (emu), 0 of the weights' left out"]
    for name, tensor in model.state_dict().items():
        theirs = old.state_dict()[name]
        if not name.startswith("class_embed."):
            assert torch.equal(tensor, theirs)
            continue
        if name.startswith("class_embed.2."):  # of the proposals: row 0 means any object, whatever the classes
            assert torch.equal(tensor[:3], theirs)
            continue
        for label, old_label in enumerate(FROM):
            assert torch.equal(tensor[label], fresh[name][label] if old_label is None else theirs[old_label])
        if "detr" in variant.values():
            assert torch.equal(tensor[-1], theirs[-1]), '"no object" stays'


def test_as_many_classes_by_other_names(tmp_path: Path) -> None:
    """Nothing about the shapes would tell."""
    config, old = detector(3, 1)
    save_weights(tmp_path / WEIGHTS, old.state_dict(), config, OLD, step=1, epochs=0)
    _, model = detector(3, 2)
    others = Categories(ids=(1, 2, 3), names=("car", "bus", "van"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"none of its classes \(cat, dog, cow\).*train\.new_class_head=true"):
        load_weights(model, tmp_path / WEIGHTS, categories=others)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    anew = load_weights(model, tmp_path / WEIGHTS, categories=others, new_class_head=True)
    assert anew == ["class_embed.0.weight", "class_embed.0.bias"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in anew else old.state_dict()[name])


def test_published_weights_bring_the_names_of_coco(tmp_path: Path) -> None:
    _, published = detector(91, 1)
    export_published(published, tmp_path / "published.pth")
    _, model = detector(2, 2)
    # COCO's list of categories: 1 person, 17 cat (cocodataset.org)
    load_weights(model, tmp_path / "published.pth", categories=Categories((1, 2), ("cat", "person")), tell=print)
    for name in ("class_embed.0.weight", "class_embed.0.bias"):
        assert torch.equal(model.state_dict()[name], published.state_dict()[name][[17, 1]])
    assert published_categories(80) is None


def test_names_that_stand_for_two_classes_go_by_id() -> None:
    old = Categories(ids=(1, 2, 3), names=("other", "cat", "other"))
    new = Categories(ids=(3, 2, 9), names=("other", "cat", "other"))
    assert label_map(old, new).old_labels == (2, 1, None)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        (lambda: Categories((1, 2, 3), ("cat", "cow", "dog")), "label 1 is 'dog' (id 2) in the checkpoint"),
        (lambda: Categories((1, 2, 4), ("cat", "dog", "cow")), "'cow' (id 3) in the checkpoint and 'cow' (id 4)"),
        (lambda: Categories((1, 2), ("cat", "dog")), "the checkpoint has 3 categories, the shards 2"),
    ],
)
def test_a_run_goes_on_with_its_own_labels_alone(shards: Callable[[], Categories], said: str) -> None:
    check_same(OLD, Categories((1, 2, 3), ("cat", "dog", "cow")), "run", "shards")
    with pytest.raises(ValueError, match="the categories of the shards shards are not those of run") as refusal:
        check_same(OLD, shards(), "run", "shards")
    assert said in str(refusal.value)


def test_heads_of_another_number_of_classes_than_the_file_names(tmp_path: Path) -> None:
    config, old = detector(3, 1)
    save_weights(tmp_path / WEIGHTS, old.state_dict(), config, NEW, step=1, epochs=0)
    _, model = detector(4, 2)
    message = (
        rf"{tmp_path / WEIGHTS}: class_embed\.0\.weight has 3 rows, but the file names 4 classes: .*new_class_head"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / WEIGHTS, categories=NEW)
