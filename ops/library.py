"""Loads the compiled operators (kernels), once per process, and says what to do when they are missing.

`_C.so` holds the schema and the CPU kernels. `_C_cuda.so` is a second file because it links libtorch_cuda, which a
CPU-only torch does not have. Importing never fails, so that `ddetr doctor` can report: the call of an operator does.
"""

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
CPU_BINARY = _FOLDER / "_C.so"
CUDA_BINARY = _FOLDER / "_C_cuda.so"
BUILD_COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall PATH_TO_THE_DDETR_SOURCES"


def _load() -> dict[str, str]:
    """Load what is there; return why the operators cannot run, by device type (nothing: they can)."""
    if hasattr(torch.ops.ddetr, "deform_attn"):
        # Registering a namespace a second time ends the process, so a reloaded module must not load again.
        return {} if hasattr(torch.ops.ddetr, "cuda_architectures") else {"cuda": _missing(CUDA_BINARY, "nvcc")}
    if not CPU_BINARY.exists():
        return dict.fromkeys(("cpu", "cuda"), _missing(CPU_BINARY, "a C++20 compiler"))
    unavailable = {}
    try:
        torch.ops.load_library(str(CPU_BINARY))
    except OSError as error:
        return dict.fromkeys(("cpu", "cuda"), _unloadable(CPU_BINARY, error))
    if torch.version.cuda is None:
        unavailable["cuda"] = f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    elif not CUDA_BINARY.exists():
        unavailable["cuda"] = _missing(CUDA_BINARY, "nvcc")
    else:
        try:
            torch.ops.load_library(str(CUDA_BINARY))
        except OSError as error:
            unavailable["cuda"] = _unloadable(CUDA_BINARY, error)
    return unavailable


def _missing(binary: Path, tool: str) -> str:
    return f"{binary} is missing, so the operators were not built. With {tool} on the PATH, run\n    {BUILD_COMMAND}"


def _unloadable(binary: Path, error: OSError) -> str:
    return (
        f"{binary} does not load in torch {torch.__version__} (it needs torch >= 2.10 and, for CUDA, the same major "
        f"version of CUDA): {error}. Build it again with\n    {BUILD_COMMAND}"
    )


UNAVAILABLE = _load()  # device type -> why the operators cannot run there


def cuda_architectures() -> list[str]:
    """Architectures in the CUDA binary, such as ["8.0", "9.0+PTX"]; empty when there is no CUDA binary."""
    return torch.ops.ddetr.cuda_architectures().split(";") if "cuda" not in UNAVAILABLE else []


def cpu_capability(limit: str = "") -> str:
    """The instruction set that the CPU kernels use: "avx512", "avx2" or "portable".

    With `limit`, use at most that one from now on (for tests and benchmarks); "avx512" lifts the limit.
    """
    return torch.ops.ddetr.cpu_capability(limit)
