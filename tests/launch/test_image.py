"""The Dockerfile, without a container engine: its RUN steps in a folder that stands for the image.

A stage is a folder with a virtual environment of its own for what pip installs there. The environments see the packages
of this interpreter, ddetr's excepted, so that nothing is fetched that is here already.
"""

import os
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ops.test_library import cuobjdump

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = REPOSITORY / "Dockerfile"
NVCC = Path("/usr/local/cuda/bin/nvcc")


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) with continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined if line)]


@dataclass
class Stage:
    """One FROM of the Dockerfile: where its files are, what it inherits, and what it does."""

    root: Path
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Image:
    """What becomes of `docker build --build-arg DEVICE=... --target ...` in the folder `root`."""

    root: Path
    device: str
    stages: dict[str, Stage] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, rest in instructions():
            if name == "FROM":
                parent, _, stage = rest.replace("${DEVICE}", self.device).split()
                self.stages[stage] = current = Stage(self.root / stage, parent)
            elif self.stages:
                current.steps.append((name, rest))

    def build(self, name: str) -> tuple[Path, dict[str, str]]:
        """Run a stage; returns its working folder and its environment."""
        stage = self.stages[name]
        environment = {"PATH": f"{stage.root}/venv/bin:/usr/bin:/bin", "HOME": str(stage.root)}
        environment |= {key: os.environ[key] for key in ("PIP_INDEX_URL", "SSL_CERT_FILE") if key in os.environ}
        make_environment(stage.root / "venv", self.root / "packages")
        steps, parent = list(stage.steps), stage.parent
        while parent in self.stages:
            steps, parent = [*self.stages[parent].steps, *steps], self.stages[parent].parent
        folder = stage.root
        for instruction, rest in steps:
            if instruction == "WORKDIR":
                folder = stage.root / rest.lstrip("/")
                folder.mkdir(parents=True, exist_ok=True)
            elif instruction == "ENV":
                environment |= dict(item.split("=", 1) for item in shlex.split(rest))
            elif instruction == "ARG":
                environment[rest] = {"TORCH_INDEX": ""}[rest]
            elif instruction == "COPY":
                self._copy(rest, folder)
            elif instruction == "RUN" and "apt-get" not in rest:
                self._run(rest, folder, environment)
        return folder, environment

    def _copy(self, arguments: str, folder: Path) -> None:
        *sources, target = arguments.split()
        source_root = REPOSITORY
        if sources[0].startswith("--from="):
            other = sources.pop(0).removeprefix("--from=")
            if other == "toolkit":  # the compiler of this machine, or none
                return
            source_root = self.stages[other].root
        for source in sources:
            path = source_root / source.lstrip("/")
            if source_root == REPOSITORY:
                assert f"!{source}" in (REPOSITORY / ".dockerignore").read_text().splitlines(), f"{source} is ignored"
            if path.is_dir():
                shutil.copytree(path, folder / target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(path, folder / target)

    def _run(self, command: str, folder: Path, environment: dict[str, str]) -> None:
        line = ["sh", "-ec", command]
        if self.device == "cpu" and NVCC.exists():  # as in the image, where there is none
            if os.geteuid() != 0:
                pytest.skip("hiding this machine's nvcc from a build for CPUs needs root")
            hidden = NVCC.resolve().parent
            line = ["unshare", "--mount", "sh", "-ec", f"mount -t tmpfs none {hidden}; {command}"]
        result = subprocess.run(
            line, cwd=folder, env=environment, capture_output=True, text=True, timeout=1700, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        self.log.append(command)


def make_environment(path: Path, packages: Path) -> None:
    if not packages.is_dir():
        packages.mkdir(parents=True)
        for folder in (Path(folder) for folder in sys.path if folder.endswith("site-packages")):
            for item in folder.iterdir():
                ours = item.name.lower().startswith(("ddetr", "__editable__", "pip")) or item.suffix == ".pth"
                if not ours and not (packages / item.name).exists():
                    (packages / item.name).symlink_to(item)
    venv.create(path, with_pip=True)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "_packages.pth").write_text(f"{packages}\n")


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            copied |= set(rest.split()[:-1])
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in allowed)


def test_the_container_runs_ddetr_as_a_user_of_its_own() -> None:
    final = Image(Path(), "cpu").stages["ddetr"].steps
    assert ("ENTRYPOINT", '["ddetr"]') in final
    user = next(rest for name, rest in final if name == "USER")
    assert int(user) > 0  # a number, by which Kubernetes can tell that it is not root


@pytest.mark.slow
def test_the_steps_for_a_cpu_make_a_working_command(tmp_path: Path, synthetic_shards: Path) -> None:
    image = Image(tmp_path, "cpu")
    image.build("wheel")
    folder, environment = image.build("ddetr")
    assert len(image.log) == 5
    (wheel,) = (tmp_path / "wheel/build/dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "ddetr/ops/_C.so" in archive.namelist()
        assert "ddetr/ops/_C_cuda.so" not in archive.namelist()

    def ddetr(*arguments: str) -> str:
        command = [tmp_path / "ddetr/venv/bin/ddetr", *arguments]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert "ddetr train" in ddetr("train", "--help")
    where = subprocess.run(
        [tmp_path / "ddetr/venv/bin/python", "-c", "import ddetr.ops; print(ddetr.ops.__file__)"],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(tmp_path)), "not the package of this repository's environment"
    ddetr("train", "tiny", f"data.train={synthetic_shards}", "train.max_steps=1", "train.device=cpu", "train.name=run",
          "train.batch_size=2", "monitor.port=0")  # fmt: skip
    assert (folder / "runs/run/checkpoints/step_00000001/checkpoint.json").is_file()


@pytest.mark.slow
def test_the_steps_for_a_gpu_compile_for_every_architecture(tmp_path: Path) -> None:
    if not NVCC.exists():
        pytest.skip(f"{NVCC} is missing: the CUDA toolkit of the image nvidia/cuda")
    image = Image(tmp_path, "cuda")
    image.build("wheel")
    (wheel,) = (tmp_path / "wheel/build/dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("ddetr/ops/_C_cuda.so", tmp_path)
    command = [cuobjdump(), "--list-elf", "--list-ptx", tmp_path / "ddetr/ops/_C_cuda.so"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for code in ("sm_80.cubin", "sm_90.cubin", "sm_100.cubin", "sm_120.cubin", "sm_120.ptx"):
        assert code in listed
