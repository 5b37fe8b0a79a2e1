"""What is shipped, what may import what, and the rules that every file keeps."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
FOLDERS = {"core": {"ops", "data"}, "ops": set(), "data": set(), "monitoring": set()}
FOLDERS["launch"] = {"core", "ops", "data", "monitoring"}
MOST_LINES = 400


def sources() -> Iterator[Path]:
    """Every file of ours that people read as text."""
    for folder in (*FOLDERS, "tests", "benchmarks", "docs", ".ci"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".sh", ".md", ".yaml", ".yml", ".sbatch"):
                yield path
    for name in ("setup.py", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", ".ci/run"):
        yield REPOSITORY / name


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import statement, the nested ones too; level counts the leading dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                yield from ((node.level, alias.name) for alias in node.names)
            else:
                yield node.level, node.module


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_they_may(folder: str) -> None:
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        depth = len(path.relative_to(REPOSITORY / folder).parts)
        for level, name in imports(path):
            assert not name.startswith("ddetr") or level, f"{path}: import siblings relatively, not {name}"
            if level == depth + 1:
                sibling = name.split(".")[0]
                assert sibling in FOLDERS[folder], f"{path}: {folder} must not import {sibling}"


ROOMS = ("model", "checkpoint", "evaluation", "training")  # of core: each may import those before it
CONFIGURATION = {"config", "glossary", "layers", "mistakes", "overrides", "ownership", "progress", "sections"}


def test_rooms_of_core_import_only_what_they_may() -> None:
    for path in sorted((REPOSITORY / "core").rglob("*.py")):
        parts = path.relative_to(REPOSITORY / "core").parts
        if len(parts) == 1 and path.stem not in CONFIGURATION:
            continue  # names for other programs
        allowed = set(ROOMS[: ROOMS.index(parts[0])] if len(parts) > 1 else ()) | CONFIGURATION
        for level, name in imports(path):
            if level == len(parts):
                assert name.split(".")[0] in allowed, f"{path} must not import {name}"


def test_the_model_knows_no_process_group_and_no_deepspeed() -> None:
    for path in (REPOSITORY / "core/model").rglob("*.py"):
        for _, name in imports(path):
            assert not f"{name}.".startswith(("torch.distributed.", "deepspeed.", "safetensors.")), f"{path}: {name}"


def test_no_circle_of_imports() -> None:
    """Nested imports count: a circle that only runs late is one."""
    paths = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    modules = {path.relative_to(REPOSITORY).with_suffix("").parts for path in paths}
    left: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path in paths:
        module = path.relative_to(REPOSITORY).with_suffix("").parts
        found = {(*module[:-level], *name.split(".")) for level, name in imports(path) if level}
        left[module] = {
            target for name in found for target in (name, (*name, "__init__")) if target in modules and target != module
        }
    while free := {module for module, wanted in left.items() if not wanted & left.keys()}:
        left = {module: wanted for module, wanted in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(map('.'.join, left))}"


@pytest.mark.integration
def test_what_is_due_is_decided_without_torch() -> None:
    script = "import sys, ddetr.core.training.schedule, ddetr.core.training.limits; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_names_that_other_programs_import() -> None:
    from ddetr.core.checkpoint import load_weights
    from ddetr.core.config import load
    from ddetr.core.detector import DeformableDetr
    from ddetr.core.evaluator import coco_metrics
    from ddetr.data.index import ShardIndex
    from ddetr.ops import deform_attn

    assert all(map(callable, (load_weights, load, DeformableDetr, coco_metrics, ShardIndex.load, deform_attn)))


def test_core_needs_no_ray_web_server_or_metrics() -> None:
    for path in (REPOSITORY / "core").rglob("*.py"):
        for _, name in imports(path):
            assert name.split(".")[0] not in ("ray", "prometheus_client", "http", "typer"), f"{path} imports {name}"


@pytest.mark.integration
def test_the_op_imports_without_the_rest() -> None:
    """A user of the op alone has torch and nothing else of ours."""
    heavy = ["deepspeed", "ray", "timm", "webdataset", "pydantic", "prometheus_client", "torchvision", "rich"]
    script = f"import sys, ddetr.ops; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_files_are_short() -> None:
    for path in sources():
        lines = len(path.read_text().splitlines())
        assert path.suffix == ".md" or lines <= MOST_LINES, f"{path}: {lines} lines; split it along a real seam"


def test_names_say_what_is_inside() -> None:
    vague = {"utils", "util", "misc", "common", "helpers", "helper", "manager", "base"}
    for path in sources():
        assert path.stem not in vague, path


def test_no_leftovers() -> None:
    leftover = re.compile(r"\bT[O]DO\b|\bFIX[M]E\b|\bX[X]X\b|/(?:home|root|Users)/[a-z]")
    for path in sources():
        found = leftover.search(path.read_text())
        assert found is None, f"{path}: {found}"


def test_no_error_is_swallowed() -> None:
    for path in (path for path in sources() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
                names = ast.unparse(node.type) if node.type else "everything"
                assert names not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno} hides {names}"


def test_every_direct_requirement_is_pinned() -> None:
    pins = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.\-]+==[\w.+]+", line), f"constraints.txt: {line}"
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    project = PROJECT["project"]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pinned), f"{requirement} does not allow the pinned {pinned}"


def test_every_pattern_of_package_data_matches_something() -> None:
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = REPOSITORY / PROJECT["tool"]["setuptools"]["package-dir"][package]
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern} matches no file"


@pytest.mark.integration
def test_git_ignores_none_of_the_product() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [f"{folder}/new_module.py" for folder in (*FOLDERS, "tests/data", "tests/core")]
    paths += ["tests/golden/new_outputs.json", "tests/golden/new_outputs.safetensors"]
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ignored.stdout == ""


@pytest.mark.slow
def test_the_wheel_holds_everything_and_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    version = PROJECT["project"]["version"]
    assert re.fullmatch(rf"ddetr-{version}-py3-none-\w+\.whl", wheel.name), wheel.name

    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    files = [path for path in (unpacked / "ddetr").rglob("*") if path.is_file()]
    shipped = {str(path.relative_to(unpacked / "ddetr")) for path in files}
    expected = {str(path.relative_to(REPOSITORY)) for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")}
    expected |= {"ops/_C.so", "core/presets/tiny.yaml", "launch/local.sh", "launch/slurm.sbatch"}
    expected |= {"launch/kubernetes/train.yaml", "ops/csrc/library.cpp"}
    assert expected <= shipped, f"missing from the wheel: {sorted(expected - shipped)}"
    assert not any(name.startswith("tests/") for name in shipped)

    script = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r}); sys.meta_path[:] = [finder for finder in sys.meta_path"
        " if 'Editable' not in getattr(finder, '__name__', '')]; import ddetr.ops.library as library, torch;"
        f"assert library.__file__.startswith({str(unpacked)!r}); from ddetr.launch.doctor import largest_difference;"
        "print(largest_difference(torch.device('cpu')))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1e-5


def test_the_tour_of_the_code_names_every_file() -> None:
    tour = (REPOSITORY / "CONTRIBUTING.md").read_text()
    for folder in FOLDERS:
        section = tour.split(f"### {folder}:")[1].split("\n### ")[0]
        for path in sorted((REPOSITORY / folder).rglob("*")):
            name = str(path.relative_to(REPOSITORY / folder))
            if path.suffix in (".py", ".sh", ".sbatch", ".cpp", ".h", ".cu", ".cuh") and path.name != "__init__.py":
                assert f"`{name}`" in section, f"CONTRIBUTING.md: the tour of {folder} lacks {name}"
