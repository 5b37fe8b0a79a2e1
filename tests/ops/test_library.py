"""Loading: torch alone suffices, a missing or foreign binary is explained, and what the CUDA binary contains."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ddetr.ops import library

pytestmark = pytest.mark.integration

CALL = """
import torch
from ddetr.ops import deform_attn
try:
    deform_attn(torch.ones(1, 1, 1, 1), [(1, 1)], torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
except OSError as error:
    print(error)
"""


def _run(code: str, folder: Path, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _copy_of_package(folder: Path) -> Path:
    """A copy of the Python files, first on the path of a process that runs in the folder."""
    package = folder / "ddetr" / "ops"
    package.mkdir(parents=True)
    for source in Path(library.__file__).parent.glob("*.py"):
        shutil.copy(source, package)
    return package


def test_a_missing_binary_is_explained(tmp_path: Path) -> None:
    package = _copy_of_package(tmp_path)
    message = _run(CALL, tmp_path)
    assert message.startswith("ddetr.ops cannot run on cpu")
    assert str(package / "_C.so") in message
    assert library.BUILD_COMMAND in message


def test_a_binary_that_does_not_load_is_explained(tmp_path: Path) -> None:
    package = _copy_of_package(tmp_path)
    (package / "_C.so").write_bytes(b"not a library")
    message = _run(CALL, tmp_path)
    assert "does not load in torch" in message
    assert library.BUILD_COMMAND in message


def test_loading_twice_does_no_harm() -> None:
    code = """
import importlib, ddetr.ops.library as library
before = dict(library.UNAVAILABLE)
assert importlib.reload(library).UNAVAILABLE == before
print(library.cpu_capability())
"""
    assert _run(code, Path.cwd()).strip() in ("avx512", "avx2", "portable")


def test_importing_needs_torch_alone() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import ddetr.ops
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(name for name in names if name not in sys.stdlib_module_names and name not in ("ddetr", "torch")))
print(sorted(name for name in sys.modules if name.startswith("ddetr.") and not name.startswith("ddetr.ops")))
"""
    assert _run(code, Path.cwd()).split("\n")[:2] == ["[]", "[]"]


def test_the_cuda_binary_has_code_for_its_architectures() -> None:
    if not library.CUDA_BINARY.exists():
        pytest.skip("the CUDA binary was not built: there was no nvcc")
    tool = cuobjdump()
    listing = subprocess.run([tool, "--list-elf", str(library.CUDA_BINARY)], capture_output=True, text=True, check=True)
    virtual = subprocess.run([tool, "--list-ptx", str(library.CUDA_BINARY)], capture_output=True, text=True, check=True)
    architectures = library.cuda_architectures()
    assert architectures
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}.cubin" in listing.stdout
        assert not architecture.endswith("+PTX") or f"sm_{number}.ptx" in virtual.stdout


def cuobjdump() -> str:
    """From the CUDA toolkit, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="cuobjdump is neither on the PATH nor in triton")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not bundled.exists():
        pytest.skip("cuobjdump is neither on the PATH nor in triton")
    return str(bundled)


@pytest.mark.parametrize(
    ("cuda", "there", "loads", "reasons"),
    [
        ("13.0", "cpu cuda", "cpu cuda", {}),
        (None, "cpu cuda", "cpu", {"cuda": "is built without CUDA: install a CUDA build of torch"}),
        ("13.0", "cpu", "cpu", {"cuda": "_cuda.so is missing, so the operators were not built. With nvcc on the PATH"}),
        ("13.0", "cpu cuda", "cpu", {"cuda": "_cuda.so does not load in torch 2.10: undefined symbol"}),
        (
            "13.0",
            "cpu cuda",
            "",
            dict.fromkeys(("cpu", "cuda"), "_cpu.so does not load in torch 2.10: undefined symbol"),
        ),
        (
            "13.0",
            "",
            "",
            dict.fromkeys(("cpu", "cuda"), "_cpu.so is missing, .* With a C[+][+]20 compiler on the PATH"),
        ),
    ],
)
def test_why_an_operator_is_unavailable(
    cuda: str | None, there: str, loads: str, reasons: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str) -> None:
        if Path(path).stem.lstrip("_") not in loads.split():
            raise OSError("undefined symbol")

    ops = SimpleNamespace(ddetr=SimpleNamespace(), load_library=load)
    monkeypatch.setattr(
        library, "torch", SimpleNamespace(ops=ops, version=SimpleNamespace(cuda=cuda), __version__="2.10")
    )
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(library, f"{name.upper()}_BINARY", tmp_path / f"_{name}.so")
        if name in there.split():
            (tmp_path / f"_{name}.so").touch()
    found = library._load()
    assert found.keys() == reasons.keys()
    for device, reason in reasons.items():
        expected = reason.replace("2.10: undefined symbol", r"2\.10 \(.*\): undefined symbol")
        assert re.search(expected, found[device]), found[device]
