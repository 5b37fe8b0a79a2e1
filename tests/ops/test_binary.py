"""The op beyond this environment: under sanitizers, its sources and its wheel beside other torch versions."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def _torch_in(name: str, pattern: str) -> str:
    found = re.search(pattern, (REPOSITORY / name).read_text(), re.MULTILINE)
    assert found is not None, f"{name} does not say which torch"
    return found[1]


NEWEST_TORCH = _torch_in("constraints.txt", r"^torch==(\S+)$")
OLDEST_TORCH = _torch_in("pyproject.toml", r'"torch>=([\d.]+)"') + ".0"


def _run(command: list[str | Path], folder: Path, minutes: int, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60 * minutes, check=False
    )


def _tests_pass(python: str | Path, folder: Path, names: list[str], **variables: str) -> str:
    """Runs tests of this folder from `folder`, where they import the `ddetr` that lies there or is installed."""
    paths = [str(REPOSITORY / "tests/ops" / name) for name in names]
    command = [python, "-m", "pytest", "-q", "-s", "--color=no", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
    command += ["--rootdir", str(REPOSITORY), "-c", str(REPOSITORY / "pyproject.toml"), *paths]
    result = _run(command, folder, 20, **variables)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout


def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Reads and writes outside a buffer, overflows and the like end the process, and so the test."""
    checks = "-fsanitize=address,undefined"
    flags = f"-O1 -g {checks} -fno-sanitize=vptr -fno-sanitize-recover=all"
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path)]
    built = _run(command, REPOSITORY, 20, CXXFLAGS=flags, LDFLAGS=checks)
    assert built.returncode == 0, built.stderr[-4000:]
    (tmp_path / "ddetr/ops/_C_cuda.so").unlink(missing_ok=True)
    # Python itself is not built with them, so their libraries must be there before all others.
    compiler = os.environ.get("CXX", "g++")
    preloaded = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    variables = {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    where = "import ddetr.ops.library as library; print(library.cpu_capability(), library.CPU_BINARY)"
    loaded = _run([sys.executable, "-c", where], tmp_path, 5, **variables)
    assert str(tmp_path) in loaded.stdout, loaded.stderr[-4000:]
    names = ["test_operators.py", "test_properties.py", "test_autograd.py"]
    _tests_pass(sys.executable, tmp_path, names, **variables)


class _RemoteFile(io.RawIOBase):
    """A file behind a URL of which only what is read is fetched."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.size = int(self._fetch("0-0")[1].rpartition("/")[2])

    def _fetch(self, extent: str) -> tuple[bytes, str]:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={extent}"})
        with urllib.request.urlopen(request, timeout=180) as response:
            if response.status != 206:
                pytest.skip(f"{self.url}: its server gives no parts of a file, and the whole wheel is too large")
            return response.read(), response.headers["Content-Range"]

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        content, _ = self._fetch(f"{self.position}-{end - 1}")
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _headers_of(version: str, folder: Path) -> Path:
    """The headers out of torch's wheel: 9 MB of 900."""
    report = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--report"]
    found = _run([*report, folder / "report.json", "-q", f"torch=={version}"], folder, 10)
    if f"No matching distribution found for torch=={version}" in found.stderr:
        pytest.skip(f"no package registry within reach has torch {version}")
    assert found.returncode == 0, found.stderr[-4000:]
    (wheel,) = json.loads((folder / "report.json").read_text())["install"]
    url = wheel["download_info"]["url"]
    local = urllib.request.url2pathname(url.removeprefix("file://")) if url.startswith("file:") else None
    with zipfile.ZipFile(local or io.BufferedReader(_RemoteFile(url), 1 << 22)) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/torch/")])
    return folder / "torch/include"


def test_the_sources_compile_beside_the_oldest_torch(tmp_path: Path) -> None:
    """Its own headers: newer ones, asked for what the oldest has, still offer macros that came later."""
    setup = runpy.run_path(str(REPOSITORY / "setup.py"))
    headers = _headers_of(OLDEST_TORCH, tmp_path)
    names = [*setup["CPU_SOURCES"], *(["cuda.cpp"] if setup["_nvcc"]() else [])]
    for source in (setup["SOURCES"] / name for name in names):
        command = [*setup["compile_command"](source, headers), "-fsyntax-only", str(source)]
        compiled = _run(command, REPOSITORY, 10)
        assert compiled.returncode == 0, compiled.stderr[-4000:]
    if "cuda.cpp" not in names:
        pytest.skip("nvcc was not found, so cuda.cpp was not compiled; the CPU's sources were")


@pytest.mark.parametrize("version", [OLDEST_TORCH, NEWEST_TORCH])
def test_the_wheel_in_a_fresh_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    """torch, the tests' own needs and the wheel: no other requirement of ddetr, and no compiler on the PATH."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
    python = environment / "bin/python"
    try:
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        packages = [f"torch=={version}", "numpy", "pytest", "hypothesis", "safetensors"]
        installed = _run([*install, *packages], tmp_path, 30)
        if f"No matching distribution found for torch=={version}" in installed.stderr:
            pytest.skip(f"no package registry within reach has torch {version}")
        assert installed.returncode == 0, installed.stderr[-4000:]
        path = str(environment / "bin")
        alone = _run([*install, "--no-deps", str(wheel)], tmp_path, 10, PATH=path)
        assert alone.returncode == 0, alone.stderr[-4000:]
        present = _run([python, "-m", "pip", "list", "--format=freeze"], tmp_path, 5).stdout.lower()
        assert f"torch=={version}" in present
        assert not any(f"{name}==" in present for name in ("deepspeed", "ray", "timm", "pydantic"))
        names = sorted(source.name for source in (REPOSITORY / "tests/ops").glob("test_*.py"))
        output = _tests_pass(python, tmp_path, names, PATH=path)
        assert re.search(r"[1-9]\d\d passed", output), output[-2000:]
    finally:
        shutil.rmtree(environment)  # 5 GB
