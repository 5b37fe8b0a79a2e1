"""`ddetr model`: the table, and that it needs neither weights nor a network."""

from pathlib import Path

import pytest
from ddetr.core.config import load
from ddetr.core.model.cost import Cost, costs
from ddetr.launch.model import model
from huggingface_hub import constants

from tests.processes import finished


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each line by its first."""
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in table.splitlines() if "│" in line]
    return {title: cells for title, *cells in lines}


def test_the_table_has_every_part_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("r50_two_stage")
    model(config)
    text = capsys.readouterr().out
    assert "deformable_detr, resnet50.tv_in1k, 80 classes, one image of 800 x 1120 pixels" in text
    assert all(unit in text for unit in ("(parameters)", "(GFLOPs)", "(%)", "10^9 multiply-adds"))
    parts = costs(config.model)
    printed = rows(text)
    assert list(printed) == [*parts, "total"]
    for part, cost in [*parts.items(), ("total", sum(parts.values(), Cost(0, 0, 0)))]:
        trained, frozen, gflops, _ = printed[part]
        assert (trained, frozen) == (f"{cost.num_trained:,}", f"{cost.num_frozen:,}")
        assert float(gflops) == pytest.approx(cost.num_multiply_adds / 1e9, abs=5e-4)
    assert sum(float(cells[-1]) for part, cells in printed.items() if part != "total") == pytest.approx(100, abs=0.4)


def test_without_a_network_and_with_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model(load("detr_r50", ["model.queries=50"]), (480, 640))
    text = capsys.readouterr().out
    assert "detr, resnet50.tv_in1k, 80 classes, one image of 480 x 640 pixels" in text
    assert "first stage" not in text
    assert not any(tmp_path.iterdir())


@pytest.mark.integration
def test_mistakes_are_one_message() -> None:
    for arguments, expected in (
        (["tinny"], "Did you mean tiny?"),
        (["tiny", "model.querys=4"], "Did you mean model.queries?"),
        (["tiny", "--image-size", "0", "640"], "image_size=(0, 640)"),
    ):
        result = finished("model", *arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("ddetr: ")
        assert "Traceback" not in result.stderr
        assert expected in result.stderr


def test_a_backbone_without_a_rate_is_shown_as_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("tiny", ["optim.backbone_multiplier=0", "model.pretrained_backbone=false"])
    model(config)
    backbone = costs(config.model)["backbone"]
    trained, frozen, *_ = rows(capsys.readouterr().out)["backbone"]
    assert (trained, frozen) == ("0", f"{backbone.num_trained + backbone.num_frozen:,}")
