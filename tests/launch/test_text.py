"""Names and messages of strangers through the real commands: readable, and an order to nothing that shows them."""

import html
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set
from ddetr.launch.cli import main
from ddetr.launch.console import LogFormatter
from ddetr.launch.drawing import fitted_text, font_of
from ddetr.launch.report import report
from ddetr.monitoring.metrics import RunMetrics
from PIL import Image
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.launch.names import LONG, NAMES, SHOWN, assert_harmless, file_of, shown_file
from tests.processes import finished

DDETR = Path(sys.executable).with_name("ddetr")


@pytest.fixture
def ddetr(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """ddetr(*arguments) in this process: (exit status, output, errors), harmless both."""
    monkeypatch.setenv("COLUMNS", "600")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddetr", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        output, errors = capfd.readouterr()
        assert_harmless(output + errors)
        return status, output, errors

    return run


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set, with a category and an image for each name."""
    folder = tmp_path_factory.mktemp("strangers")
    path = draw_set(folder, images=len(NAMES), size=64, classes=3, seed=5)
    values = json.loads(path.read_text())
    for image, name in zip(values["images"], NAMES, strict=True):
        (folder / "images" / image["file_name"]).rename(folder / "images" / file_of(name))
        image["file_name"] = file_of(name)
    values["categories"] = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    for annotation in values["annotations"]:
        annotation["category_id"] = annotation["id"] % len(NAMES) + 1
    path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def shards(coco: Path) -> Path:
    pack(coco / "annotations.json", coco / "images", coco / "shards", workers=1)
    return coco / "shards"


@pytest.fixture(scope="module")
def run_of_strangers(make_run: Callable[..., Path], shards: Path) -> Path:
    """A run directory with a name of that kind, whose checkpoint knows these categories."""
    folder = shards.parent / "run [v2] $x$ <b>\x1b[2J"
    return make_run(folder, shards, (1,), f"model.num_classes={len(NAMES)}", "eval.score_threshold=0")


@pytest.mark.integration
def test_a_set_is_checked_packed_counted_and_shown(coco: Path, shards: Path, tmp_path: Path, ddetr) -> None:
    images = coco / "images"
    assert ddetr("data", "check", coco / "annotations.json", images)[0] == 0
    assert ddetr("data", "check", shards)[0] == 0
    status, output, _ = ddetr("data", "pack", coco / "annotations.json", images, tmp_path / "on \x1b[2J[/]")
    assert status == 0
    assert r"on \x1b[2J[/]: " in output
    status, output, _ = ddetr("data", "stats", shards)
    assert status == 0
    for name in NAMES:
        assert SHOWN[name] in output
    assert LONG[:100] not in output
    assert ddetr("data", "show", shards, tmp_path / "all.png", "--count", len(NAMES))[0] == 0
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.size == (2000, 2000)


@pytest.mark.integration
def test_a_narrow_table_cuts_no_name(shards: Path, monkeypatch: pytest.MonkeyPatch, ddetr) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, output, _ = ddetr("data", "stats", shards)
    first_column = "".join("".join(line.split("│")[1:2]).strip() for line in output.splitlines())
    for name in NAMES:
        assert SHOWN[name].strip().replace(" ", "") in first_column.replace(" ", "")


@pytest.mark.integration
def test_what_is_wrong_with_a_set_is_told(coco: Path, tmp_path: Path, ddetr) -> None:
    values = json.loads((coco / "annotations.json").read_text())
    for image, name in zip(values["images"], NAMES, strict=True):
        image["file_name"] = f"no {name}"
    broken = tmp_path / "broken [/]\x1b[2J.json"
    broken.parent.mkdir()
    broken.write_text(json.dumps(values))
    status, output, _ = ddetr("data", "check", broken, coco / "images")
    assert status == 1
    shown = [name for name in sorted(NAMES, key=NAMES.index) if SHOWN[name] in output]
    assert len(shown) == 20, "as many as are shown of a kind"
    assert r"broken [/]\x1b[2J.json: 23 error(s)" in output
    status, _, errors = ddetr("data", "pack", broken, coco / "images", tmp_path / "out")
    assert status == 2
    first, *more = errors.strip().splitlines()
    assert first.startswith("ddetr: ")
    assert first.endswith("23 error(s):")
    assert all(line.startswith("  ") for line in more)


@pytest.mark.slow
def test_a_checkpoint_of_strangers(run_of_strangers: Path, coco: Path, tmp_path: Path, ddetr) -> None:
    status, output, _ = ddetr("checkpoint", "inspect", run_of_strangers)
    assert status == 0
    for name in NAMES:
        assert SHOWN[name] in output
    assert LONG[:100] not in output
    status, output, _ = ddetr("checkpoint", "export", run_of_strangers, tmp_path / "[/]\x1b[2J.safetensors")
    assert status == 0
    assert r"[/]\x1b[2J.safetensors: " in output
    status, output, _ = ddetr("eval", run_of_strangers, "--output", tmp_path / "eval [/]")
    assert status == 0
    assert r"run [v2] $x$ <b>\x1b[2J" in output
    truth = json.loads((tmp_path / "eval [/]/ground_truth.json").read_text())
    assert tuple(category["name"] for category in truth["categories"]) == NAMES, "files hold the names as they are"


@pytest.mark.slow
def test_images_of_strangers(run_of_strangers: Path, coco: Path, tmp_path: Path, ddetr) -> None:
    images = tmp_path / "images [/]"
    images.mkdir(parents=True)
    for name in NAMES:
        (images / file_of(name)).write_bytes((coco / "images" / file_of(name)).read_bytes())
    (images / ("n" * 251 + ".png")).write_bytes((coco / "images" / file_of("ß")).read_bytes())
    (images / ("é" * 125 + ".webp")).write_bytes((coco / "images" / file_of("ß")).read_bytes())
    for name in ("cut", *NAMES):
        (images / f"no {file_of(name)}").write_bytes(b"no image")
    status, output, errors = ddetr("predict", run_of_strangers, images, "--output", tmp_path / "out [/]")
    assert status == 2
    assert f"{len(NAMES) + 2} image(s): " in output
    for name in NAMES:
        assert f"no {shown_file(name)}" in errors
    assert len(errors[errors.index("ddetr: ") :].splitlines()) == 2 + len(NAMES), "a line for each"
    content = json.loads((tmp_path / "out [/]/predictions.json").read_text())
    assert {entry["file"] for entry in content["images"]} >= {str(images / file_of(name)) for name in NAMES}
    assert {row["name"] for entry in content["images"] for row in entry["detections"]} <= set(NAMES)
    for entry in content["images"]:
        assert len(os.fsencode(entry["drawn"])) <= 255
        with Image.open(tmp_path / "out [/]" / entry["drawn"]) as drawn:
            assert max(drawn.size) == 800


@pytest.mark.slow
@pytest.mark.parametrize("shown", [r"$\frac$", r"a\x1b]0;t\x07b\n<script>x</script>$x$ " + "on and on " * 99])
def test_a_category_is_drawn_and_no_formula(
    shown: str, make_run: Callable[..., Path], coco: Path, tmp_path: Path, ddetr
) -> None:
    name = shown.replace(r"\x1b", "\x1b").replace(r"\x07", "\x07").replace(r"\n", "\n")
    values = json.loads((coco / "annotations.json").read_text())
    values["categories"] = [{**category, "name": name} for category in values["categories"]]
    (tmp_path / "same.json").write_text(json.dumps(values))
    pack(tmp_path / "same.json", coco / "images", tmp_path / "shards", workers=1)
    run = make_run(tmp_path / "run", tmp_path / "shards", (1,), f"model.num_classes={len(NAMES)}")
    status, output, errors = ddetr("explain", run, coco / "images" / file_of("ß"), "--output", tmp_path / "why.svg")
    assert status == 0, errors
    assert output.startswith("query ")
    assert f": {shown[:50]}" in output
    picture = ElementTree.parse(tmp_path / "why.svg")
    assert not [element for element in picture.iter() if element.tag.lower().endswith("script")]
    width = float(str(picture.getroot().get("width")).removesuffix("pt"))
    assert width < 1500


def test_a_text_is_cut_where_the_picture_ends() -> None:
    font = font_of(16)
    assert fitted_text("a name", 100, font) == "a name"
    cut = fitted_text(LONG, 100, font)
    assert cut.endswith("…")
    assert 60 < font.getlength(cut) <= 100
    assert fitted_text("two\nlines\x1b", 400, font) == r"two\nlines\x1b"


def test_letters_beyond_english_are_drawn() -> None:
    font = font_of(16)
    lacking = bytes(font.getmask("\u0378"))
    assert all(bytes(font.getmask(letter)) != lacking for letter in "éßñžøяλשع…")


def test_errors_are_one_paragraph(tmp_path: Path, ddetr) -> None:
    for name in NAMES:
        if "\ud83d" not in name and name != LONG:
            status, output, errors = ddetr("data", "check", tmp_path / "none" / name, tmp_path)
            assert (status, output) == (2, "")
            first, *more = errors.strip().splitlines()
            assert first.startswith("ddetr: ")
            assert all(line.startswith("  ") for line in more)
            for part in SHOWN[name].replace("//", "/").split(r"\n"):  # as paths have it
                assert part in errors
    for arguments in (
        ("eval", "x", "--\x1b[2J[/]\x9b"),
        ("[red]\x1b[2J",),
        ("data", "synth", "x", "--images", "[/]\x1b"),
    ):
        status, output, errors = ddetr(*arguments)
        assert status == 2
        assert "Error" in errors


@pytest.mark.parametrize("name", NAMES)
def test_a_record_of_the_log_is_one_entry(name: str, tmp_path: Path) -> None:
    log = logging.Logger("strangers")
    handler = logging.FileHandler(tmp_path / "log.txt", encoding="utf-8")
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.warning("left out: %s", name)
    log.warning("first\nsecond")
    handler.close()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert_harmless(text)
    for part in SHOWN[name].split(r"\n"):
        assert part in text
    entries = [line for line in text.split("\n") if line and not line.startswith("  ")]
    assert len(entries) == 2
    assert text.endswith(" first\n  second\n")


@pytest.mark.parametrize("name", [name for name in NAMES if "\ud83d" not in name])
def test_the_run_label_of_a_metric_is_the_name(name: str) -> None:
    samples = [
        sample
        for family in text_string_to_metric_families(generate_latest(RunMetrics(name, 0).registry).decode())
        for sample in family.samples
        if "run" in sample.labels
    ]
    assert samples
    assert {sample.labels["run"] for sample in samples} == {name}


@pytest.mark.slow
def test_a_terminal_is_given_no_order(shards: Path) -> None:
    """On a real one, where rich draws colours and a bar that moves."""
    primary, secondary = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(
        [DDETR, "data", "stats", shards], stdin=secondary, stdout=secondary, stderr=secondary, env=environment
    )
    os.close(secondary)
    output = b""
    while True:
        try:
            piece = os.read(primary, 1 << 16)
        except OSError:  # the other end is closed
            break
        output += piece
        if not piece:
            break
    os.close(primary)
    assert process.wait(60) == 0
    text = output.decode()
    assert "\x1b[" in text, "colours"
    for order in ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\x07"):
        assert order not in text
    for name in NAMES:
        assert SHOWN[name] in text


@pytest.mark.slow
def test_a_training_run_of_strangers(shards: Path, tmp_path: Path) -> None:
    name = "run [v2] $x$ <b> :smile:"
    overrides = ["model.backbone=resnet18.a1_in1k", "model.pretrained_backbone=false", "model.backbone_norm=group"]
    overrides += [f"model.num_classes={len(NAMES)}", "model.hidden_dim=32", "model.encoder_layers=1"]
    overrides += ["model.decoder_layers=1", "train.batch_size=4", "train.max_steps=2", "train.log_every_steps=1"]
    overrides += [f"data.train={shards}", f"data.validation={shards}", f"train.output={tmp_path}"]
    overrides += [f"train.name={json.dumps(name)}", "train.device=cpu", "monitor.port=0", "eval.top_k=10"]
    done = finished("train", "tiny", *overrides)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / name / "log.txt").read_text(encoding="utf-8")
    assert_harmless(log)
    assert f"run directory {tmp_path / name}" in log
    assert "step 2/2" in log
    assert f"run directory {tmp_path / name}" in done.stdout
    targets = json.loads((tmp_path / name / "targets.json").read_text())
    assert targets == []
    assert f"<h1>{html.escape(name)}</h1>" in report(tmp_path / name).read_text()


@pytest.mark.integration
def test_a_warning_where_no_log_is_kept_is_one_entry() -> None:
    script = "import sys, logging\nfrom ddetr.launch.cli import main\nsys.argv = ['ddetr', '--version']\n"
    script += (
        "try:\n    main()\nexcept SystemExit:\n    logging.getLogger('ddetr').warning('%s', 'a\\x1b[2J\\nddetr: b')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "a\\x1b[2J\n  ddetr: b\n"
