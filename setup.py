"""Builds the compiled operators (ddetr.ops) during `pip install`; everything else is in pyproject.toml.

ops/_C.so holds the CPU kernels. ops/_C_cuda.so holds the CUDA kernels and is built when nvcc is found, whether or not
this machine has a GPU. Both use the LibTorch stable ABI and no Python API, so the wheel is `py3-none-<platform>`.

Environment variables, as in torch's own extension builder:
TORCH_CUDA_ARCH_LIST (default "8.0;9.0+PTX"), MAX_JOBS (compilers at once, default the number of processors),
CXX (default g++), CXXFLAGS and LDFLAGS (added to the host compiler's), CUDA_HOME (default where nvcc is on the PATH,
then /usr/local/cuda).
"""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("ops/csrc")
OBJECTS = Path("build/operators")
CPU_SOURCES = ("library.cpp", "cpu.cpp", "cpu_portable.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp")
CUDA_SOURCES = ("cuda.cpp", "cuda_tuned.cu", "cuda_generic.cu")
# The oldest torch that the binaries run in: the headers then offer nothing newer.
TORCH_TARGET_VERSION = "0x020a000000000000"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


class BuildOperators(build_ext):
    """Plain compiler calls. torch's builder would refuse nvcc beside a CPU-only torch and name files by Python ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        self.torch_folder = Path(torch.__file__).parent
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1) as pool:
            objects = list(pool.map(self._compile, ext.sources))
        libraries = ["-ltorch_cpu"]
        if ext.name.endswith("_cuda"):
            home = _cuda_home()
            libraries += [*self._libtorch_cuda(), f"-L{home / 'lib64'}", f"-L{home / 'lib'}"]
            libraries += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        # Linked beside the target and renamed: a process that has the old file open keeps it whole.
        partial = target.with_suffix(".so.partial")
        folders = [f"-L{self.torch_folder / 'lib'}", *os.environ.get("LDFLAGS", "").split()]
        _run([_cxx(), "-shared", "-o", str(partial), *objects, *folders, *libraries])
        partial.replace(target)

    def _libtorch_cuda(self) -> list[str]:
        if (self.torch_folder / "lib/libtorch_cuda.so").exists():
            return ["-ltorch_cuda"]
        # A CPU-only torch has none to link. An empty library of that name records the need for the real one.
        stub = OBJECTS / "stub/libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        _run([_cxx(), "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub), "-x", "c++", os.devnull])
        return [f"-L{stub.parent}", "-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"]

    def _compile(self, source: str) -> str:
        command = compile_command(Path(source), self.torch_folder / "include")
        # An object is named by all that went into it, so that a rebuild compiles only what changed. Not in build_temp:
        # an editable install throws that away.
        digest = hashlib.sha256(repr((command, self.torch_folder)).encode())
        for path in sorted(SOURCES.iterdir()):
            if path.suffix in (".h", ".cuh") or path == Path(source):
                digest.update(path.read_bytes())
        target = OBJECTS / f"{Path(source).name}.{digest.hexdigest()[:16]}.o"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.o")
            _run([*command, "-c", source, "-o", str(partial)])
            partial.replace(target)
        return str(target)


class WheelForAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_command(source: Path, torch_headers: Path) -> list[str]:
    """Compiler and flags for a source of the operators; what to do with it, and the source itself, come after them."""
    # -fno-trapping-math lets comparisons become vector code. Never -ffast-math: it drops NaN, and linking with it
    # turns on flush-to-zero in the whole process. Never -march=native: a wheel travels.
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    host += ["-fno-math-errno", "-fno-trapping-math"]
    shared = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch_headers)]
    if source.suffix == ".cu":
        command = [str(_cuda_home() / "bin/nvcc"), *shared, "--threads=2", *_gencode()]
        return command + [f"-Xcompiler={flag}" for flag in host]
    command = [_cxx(), *shared, *host, *os.environ.get("CXXFLAGS", "").split()]
    if source.name == "cuda.cpp":
        command += ["-DUSE_CUDA", "-isystem", str(_cuda_home() / "include")]
        command += [f'-DDDETR_CUDA_ARCHITECTURES="{";".join(_cuda_architectures())}"']
    return command


def _run(command: list[str]) -> None:
    print(" ".join(command), file=sys.stderr)
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CompileError(f"{command[0]} was not found: install a C++20 compiler, or set CXX to yours") from error
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        raise CompileError(f"the command above failed:\n{result.stderr[-4000:]}")


def _cxx() -> str:
    return os.environ.get("CXX", "g++")


def _nvcc() -> Path | None:
    for candidate in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if candidate and (Path(candidate) / "bin/nvcc").exists():
            return Path(candidate) / "bin/nvcc"
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def _cuda_home() -> Path:
    nvcc = _nvcc()
    assert nvcc is not None  # else there is no CUDA extension to build
    return nvcc.parent.parent


def _cuda_architectures() -> list[str]:
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
    return chosen.replace(" ", ";").split(";")


def _gencode() -> list[str]:
    flags = []
    for architecture in _cuda_architectures():
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _extensions() -> list[Extension]:
    extensions = [Extension("ddetr.ops._C", [str(SOURCES / name) for name in CPU_SOURCES])]
    if _nvcc() is None:
        print("ddetr: nvcc was not found, so the operators are built for the CPU only", file=sys.stderr)
    else:
        extensions.append(Extension("ddetr.ops._C_cuda", [str(SOURCES / name) for name in CUDA_SOURCES]))
    return extensions


if __name__ == "__main__":
    setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildOperators, "bdist_wheel": WheelForAnyPython})
