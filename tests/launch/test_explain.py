"""`ddetr explain`: the drawn sampling points against a computation from the modules' parameters."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ddetr.core.checkpoint.trained import TrainedDetector, load_detector
from ddetr.core.config import load
from ddetr.core.model.attention import MultiScaleDeformableAttention
from ddetr.core.model.detector import build
from ddetr.data.transforms import load_image
from ddetr.launch.explain import Explanation, explain, explained
from ddetr.ops import reference
from PIL import Image

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["two_stage", "plain"])
def detector(
    request: pytest.FixtureRequest,
    run_directory: Path,
    make_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainedDetector:
    """With reference boxes in the decoder (two-stage), and with reference points (plain)."""
    if request.param == "two_stage":
        return load_detector(run_directory)
    plain = ("model.two_stage=false", "model.box_refine=false")
    return load_detector(make_run(tmp_path_factory.mktemp("plain"), run_directory.parent / "shards", (1,), *plain))


@pytest.fixture(scope="module")
def pixels(run_directory: Path) -> np.ndarray:
    return load_image(sorted((run_directory.parent / "coco/images").iterdir())[1].read_bytes())


def attention_calls(detector: TrainedDetector, pixels: np.ndarray, query: int) -> tuple[Explanation, dict[str, tuple]]:
    """explained(), and each attention module's arguments and result during it."""
    calls: dict[str, tuple] = {}
    handles = []
    for name, module in detector.model.named_modules():
        if isinstance(module, MultiScaleDeformableAttention):

            def keep(_: object, arguments: tuple, result: torch.Tensor, name: str = name) -> None:
                calls[name] = (arguments, result)

            handles.append(module.register_forward_hook(keep))
    explanation = explained(detector, pixels, query)
    for handle in handles:
        handle.remove()
    return explanation, calls


def test_points_follow_from_the_parameters(detector: TrainedDetector, pixels: np.ndarray) -> None:
    explanation, calls = attention_calls(detector, pixels, query=7)
    module = detector.model.transformer.decoder.layers[-1].cross_attn
    (query, reference_points, _, shapes, _), _ = calls["transformer.decoder.layers.1.cross_attn"]
    state = query[0, 7].double().numpy()
    offsets = module.sampling_offsets.weight.double().numpy() @ state + module.sampling_offsets.bias.double().numpy()
    logits = module.attention_weights.weight.double().numpy() @ state + module.attention_weights.bias.double().numpy()
    for head in range(module.heads):
        exponentials = np.exp(
            [logits[head * module.levels * module.points + k] for k in range(module.levels * module.points)]
        )
        for level, (height, width) in enumerate(shapes):
            anchor = reference_points[0, 7, level].tolist()
            for point in range(module.points):
                flat = (head * module.levels + level) * module.points + point
                dx, dy = offsets[2 * flat], offsets[2 * flat + 1]
                if len(anchor) == 4:  # inside the box: offsets count in halves of its size, over the points
                    x, y = (
                        anchor[0] + dx / module.points * anchor[2] / 2,
                        anchor[1] + dy / module.points * anchor[3] / 2,
                    )
                else:  # offsets count in pixels of the level
                    x, y = anchor[0] + dx / width, anchor[1] + dy / height
                assert explanation.decoder.locations[head, level, point].tolist() == pytest.approx([x, y], abs=1e-5)
                weight = exponentials[level * module.points + point] / exponentials.sum()
                assert float(explanation.decoder.weights[head, level, point]) == pytest.approx(weight, abs=1e-6)
    assert explanation.decoder.reference.tolist() == pytest.approx(reference_points[0, 7, 0, :2].tolist())


def test_sampling_there_gives_what_the_model_computed(detector: TrainedDetector, pixels: np.ndarray) -> None:
    explanation, calls = attention_calls(detector, pixels, query=3)
    shapes = calls["transformer.encoder.layers.0.self_attn"][0][3]
    height, width = shapes[0]
    cx = (explanation.box_xyxy[0] + explanation.box_xyxy[2]).clamp(0, 2) / 2
    cy = (explanation.box_xyxy[1] + explanation.box_xyxy[3]).clamp(0, 2) / 2
    position = min(int(cy * height), height - 1) * width + min(int(cx * width), width - 1)
    for name, points, row in (
        ("transformer.decoder.layers.1.cross_attn", explanation.decoder, 3),
        ("transformer.encoder.layers.0.self_attn", explanation.encoder, position),
    ):
        module = detector.model.get_submodule(name)
        assert isinstance(module, MultiScaleDeformableAttention)
        (_, _, tokens, shapes, _), result = calls[name]
        value = module.value_proj(tokens).view(1, tokens.shape[1], module.heads, -1)
        sampled = reference.deform_attn(value, shapes, points.locations[None, None], points.weights[None, None])
        torch.testing.assert_close(module.output_proj(sampled)[0, 0], result[0, row], atol=2e-4, rtol=1e-3)


def test_the_best_query_is_the_default(detector: TrainedDetector, pixels: np.ndarray) -> None:
    best = explained(detector, pixels)
    scores = [explained(detector, pixels, query).score for query in range(detector.config.model.queries)]
    assert best.score == pytest.approx(max(scores), abs=1e-6)
    assert best.query == int(np.argmax(scores))
    with pytest.raises(ValueError, match="query 30: this detector has queries 0 to 29"):
        explained(detector, pixels, 30)


def test_no_hook_stays(detector: TrainedDetector, pixels: np.ndarray) -> None:
    explained(detector, pixels)
    assert not [m for m in detector.model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_the_picture_is_written(run_directory: Path, tmp_path: Path) -> None:
    image = sorted((run_directory.parent / "coco/images").iterdir())[1]
    explain(run_directory, image, tmp_path / "new/why.png", query=2)
    with Image.open(tmp_path / "new/why.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 500
    with pytest.raises(ValueError, match=r"why\.xyz: unknown picture format"):
        explain(run_directory, image, tmp_path / "why.xyz")
    (tmp_path / "bad.jpg").write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bad\.jpg: "):
        explain(run_directory, tmp_path / "bad.jpg", tmp_path / "bad.png")


@pytest.mark.parametrize("settings", [("detr_r50",), ("r50", "model.multi_scale_attention=false")])
def test_attention_without_sampling_points_is_refused(settings: tuple[str, ...], pixels: np.ndarray) -> None:
    config = load(
        settings[0], ["model.backbone=test_resnet.r160_in1k", "model.pretrained_backbone=false", *settings[1:]]
    )
    with torch.device("meta"):
        model = build(config.model)
    with pytest.raises(ValueError, match=r"weights: only multi-scale deformable attention has sampling points to draw"):
        explained(TrainedDetector(model, config, None, None, None, Path("weights")), pixels)
