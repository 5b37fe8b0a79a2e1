"""What the documents say against the code: commands, settings, Python, metrics, alerts, files, links."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ddetr.core.config import Config, load
from ddetr.core.overrides import read
from ddetr.launch.arguments import is_override
from ddetr.launch.sweep import read_sweep
from ddetr.monitoring.metrics import METRICS
from pydantic import create_model

from tests.launch.documents import DOCUMENTS, REPOSITORY, Document, split
from tests.launch.parsing import Parsed, parse

# CHANGELOG.md speaks of what was, RESULTS.md of what was measured at some commit.
CURRENT = [document for document in DOCUMENTS if document.path.name not in ("CHANGELOG.md", "RESULTS.md")]
README, OPERATIONS = Document(Path("README.md")), Document(Path("docs/operations.md"))
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # typer does not export its name

current = pytest.mark.parametrize("document", CURRENT, ids=lambda document: document.path.name)


def parsed(words: list[str], *, whole: bool) -> Parsed | None:
    """What the real command line makes of the words after `ddetr`, without executing it; None where it prints its help.

    Raises UsageError as it does. Of one that is not whole, within a sentence, positional arguments may be left out.
    A word `...` stands for some, COMMAND for any command.
    """
    words = [word for word in words if word != "..."]
    if words[:1] == ["COMMAND"]:
        return None
    for left_out in range(4):
        try:
            return parse([*words, *["LEFT_OUT"] * left_out])
        except USAGE_ERROR as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # such as `ddetr data`
                return None
            if whole or type(error).__name__ != "MissingParameter":
                raise
    raise AssertionError(words)


def train_arguments(words: list[str]) -> list[str] | None:
    """What a launch script, the image or torchrun hands to `ddetr`; None of other lines."""
    scripts = [number for number, word in enumerate(words) if re.fullmatch(r"launch/\w+\.(sh|sbatch)", word)]
    if scripts:
        script, rest = words[scripts[0]], words[scripts[0] + 1 :]
        options = re.findall(r"^ +(--[a-z-]+)\)", (REPOSITORY / script).read_text(), re.MULTILINE)
        while rest and rest[0] in options:
            rest = rest[2:]
        return ["train", *(rest[1:] if script == "launch/ssh.sh" else rest)]
    for before in ("ddetr:0.1.0", "--"):
        if before in words and words[words.index(before) + 1 :][:1] == ["train"]:
            return words[words.index(before) + 1 :]
    return None


def command_lines(document: Document) -> Iterator[tuple[list[str], bool]]:
    """The words after `ddetr` of every command, and whether it is a whole one, in a block, or one within a sentence."""
    for words in document.shell_lines:
        while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
            words = words[1:]
        if words[:1] == ["ddetr"] or (words[:1] == ["bash"] and "ddetr" in words):  # a launcher starts what follows it
            yield words[words.index("ddetr") + 1 :], True
        elif (arguments := train_arguments(words)) is not None:
            yield arguments, True
    for span in document.spans:
        words = split(span)
        if words[:1] == ["ddetr"] and len(words) > 1:
            yield words[1:], False
        elif (arguments := train_arguments(words)) is not None:
            yield arguments, False


def named_files(document: Document, folder: Path) -> dict[str, Path]:
    """The YAML files that the document shows, by the name in their first line, written into a folder."""
    files = {}
    for block in document.blocks("yaml"):
        if name := re.match(r"# ([\w.]+\.yaml)\n", block):
            files[name[1]] = folder / name[1]
            files[name[1]].write_text(block)
    return files


@current
def test_commands_are_those_of_the_command_line(document: Document, tmp_path: Path) -> None:
    files = named_files(document, tmp_path)
    for words, whole in command_lines(document):
        line = f"{document.path}: ddetr {' '.join(words)}"
        try:
            found = parsed(words, whole=whole)
        except USAGE_ERROR as error:
            pytest.fail(f"{line}: {error}")
        if found is None:
            continue
        command, values = found
        given = [word for many in values.values() if isinstance(many, list | tuple) for word in map(str, many)]
        overrides = [word for word in given if is_override(word)]
        named = [word for word in given if word not in overrides]
        if not command.endswith((" train", " config")):
            named = values.get("preset") or ["tiny"]
            named = [named] if isinstance(named, str) else named
        stand_for_one = re.compile(r"[A-Z_]+(\.yaml)?")
        load(["tiny" if stand_for_one.fullmatch(name) else files.get(name, name) for name in named], overrides)


def settings(document: Document) -> Iterator[tuple[str, str]]:
    """Every `section.key` and `section.key=value` within a line and in blocks of a shell; no value for the first."""
    key = rf"(?:{'|'.join(Config.model_fields)})\.\w+"
    for words in [*map(split, document.spans), *document.shell_lines]:
        for word in words:
            if override := re.match(rf"({key})=(.+)", word):
                yield override[1], override[2].rstrip(",.;:)")
                continue
            for name in re.findall(rf"(?<![\w./@-]){key}", word):
                if not re.search(
                    r"\.(md|py|yaml|yml|json|jsonl|sh|svg|png|html|safetensors|sbatch|txt|pth|tar)$", name
                ):
                    yield name, ""


@current
def test_settings_exist_and_their_values_fit(document: Document) -> None:
    for key, value in settings(document):
        section, name = key.split(".")
        fields = Config.model_fields[section].annotation.model_fields
        assert name in fields, f"{document.path}: {key} is no setting"
        if value and "..." not in value and not re.fullmatch(r"[A-Z_]+", value):  # which stand for one
            _, read_value = read(f"{key}={value}", Config)
            alone: Any = {name: (fields[name].annotation, fields[name])}
            create_model("Setting", **alone).model_validate({name: read_value})


def test_yaml_files_in_the_documents_are_read(
    tmp_path: Path, synthetic_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep as `ddetr tune` reads it, with shards where it says."""
    (tmp_path / "shards").mkdir()
    for part in ("train", "val"):
        (tmp_path / "shards" / part).symlink_to(synthetic_shards)
    monkeypatch.chdir(tmp_path)
    found = []
    for document in CURRENT:
        for name, path in named_files(document, tmp_path).items():
            found.append(name)
            if name == "sweep.yaml":
                read_sweep(path)
            else:
                load(path)
    assert "mine.yaml" in found
    assert "sweep.yaml" in found


@pytest.mark.parametrize("path", ["README.md", "docs/op.md"])
def test_python_that_needs_nothing_else_runs(path: str) -> None:
    """Of the page of the operators tests/ops/test_drop_in.py runs what takes the place of other implementations."""
    ran = 0
    for block in Document(Path(path)).blocks("python"):
        if "transformers" not in block:
            exec(compile(block, path, "exec"), {"__name__": "document"})
            ran += 1
    assert ran


@current
def test_python_is_python_and_its_names_exist(document: Document) -> None:
    for block in document.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddetr"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), f"{document.path}: {ast.unparse(node)}"


@current
def test_metrics_and_alerts_exist(document: Document) -> None:
    """That operations.md lists every metric and alert is tested in tests/monitoring."""
    rules = yaml.safe_load((REPOSITORY / "monitoring/prometheus/rules.yml").read_text())["groups"][0]["rules"]
    alerts = yaml.safe_load((REPOSITORY / "monitoring/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    code = " ".join([*document.spans, *document.blocks()])
    for name in re.findall(r"(?<![\w:./-])ddetr_\w+", code):
        names = {metric.name for metric in METRICS}
        assert re.sub(r"_(bucket|sum|count)$", "", name) in names, f"{document.path}: {name} is no metric"
    for name in re.findall(r"\brun(?:_rank)?:\w+(?::\w+)?", code):
        assert name in {rule["record"] for rule in rules}, f"{document.path}: {name} is not recorded"
    for name in re.findall(r"\bDdetr[A-Z]\w+", document.text):
        assert name in {alert["alert"] for alert in alerts}, f"{document.path}: {name} is no alert"


def test_operations_lists_every_recorded_series() -> None:
    for rule in yaml.safe_load((REPOSITORY / "monitoring/prometheus/rules.yml").read_text())["groups"][0]["rules"]:
        assert f"`{rule['record']}`" in OPERATIONS.text, f"docs/operations.md lacks {rule['record']}"


@current
def test_files_and_make_targets_exist(document: Document) -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for text in [*document.spans, *(" ".join(words) for words in document.shell_lines)]:
        for path in re.findall(r"(?<![\w./<*:-])(?:core|ops|launch|monitoring|tests|benchmarks|docs)/[\w./-]*", text):
            assert (REPOSITORY / path.rstrip(".")).exists(), f"{document.path}: {path} does not exist"
        for target in re.findall(r"^make ([a-z-]+)", text):
            assert target in targets, f"{document.path}: make {target} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.path.name)
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links:
        path, _, anchor = link.partition("#")
        target = (document.path.parent / path) if path else document.path
        assert (REPOSITORY / target).exists(), f"{document.path}: {link} does not exist"
        if anchor:
            resolved = (REPOSITORY / target).resolve().relative_to(REPOSITORY)
            assert anchor in Document(resolved).anchors, f"{document.path}: {link} has no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in README.links}
    pages = {str(document.path) for document in DOCUMENTS if document.path.parts[0] == "docs"}
    assert pages <= linked, f"README.md links no {sorted(pages - linked)}"


def test_names_of_code_that_the_operators_page_gives_exist() -> None:
    """`ddetr.ops.library.cpu_capability()` and the like, in every document."""
    for document in CURRENT:
        for name in re.findall(r"\bddetr(?:\.\w+)+", " ".join(document.spans)):
            *module, attribute = name.split(".")
            if name.endswith((".whl", ".yaml", ".json")) or module == ["ddetr"]:
                continue
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(".".join(module)), attribute), f"{document.path}: {name}"
    assert "ddetr.launch.cli" in sys.modules
