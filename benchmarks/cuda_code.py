"""What the compiler made of the CUDA kernels: registers, memory, and the instructions that decide their speed.

    python benchmarks/cuda_code.py

Needs no GPU: reads the machine code in ops/_C_cuda.so with cuobjdump. Prints a markdown table for every architecture in
it. Take it before and after a change to a kernel: a spill, a loss of warps or a longer loop shows here first.

Columns: `stack` is the bytes of a thread's registers and arrays in local memory, with the instructions that load and
store them. `shared` is the bytes of a block, fixed + what the launch asks for at L = P = 4. `warps` is how many stay on
one multiprocessor, as registers, shared memory and the architecture allow. `loop` is the innermost loop with 16-byte
loads: its instructions for each of them. `reductions` are atomic additions to memory, those of four numbers + of one.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddetr.ops import library

POINTS = 4 * 4  # L * P
LANES_OF_WARP = 32
REGISTERS = 64 * 1024
RESERVED_SHARED = 1024  # the system's, in every block
# Of a multiprocessor: shared memory, warps, blocks. CUDA C++ Programming Guide, technical specifications.
LIMITS = {
    "sm_80": (164 << 10, 64, 32),
    "sm_86": (100 << 10, 48, 16),
    "sm_89": (100 << 10, 48, 24),
    "sm_90": (228 << 10, 64, 32),
}
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
KERNEL = re.compile(rf"([a-z]+)_kernelI({'|'.join(TYPES)})(?:Li(\d+)E)?E")  # mangled: name, type, lanes
COLUMNS = "kernel|lanes|registers|stack (loads + stores)|shared|warps|instructions|16-byte loads|loop|reductions"


@dataclass
class Kernel:
    name: str
    dtype: str
    lanes: int  # of an item; 0 on the generic path
    registers: int = 0
    stack_bytes: int = 0
    fixed_shared_bytes: int = 0
    code: list[tuple[int, str]] = field(default_factory=list)  # address, instruction without its predicate

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for _, instruction in self.code)

    def loop(self) -> float | None:
        """Instructions for each 16-byte load in the shortest loop that has any."""
        lengths = []
        for address, instruction in self.code:
            branch = re.match(r"BRA .*?(0x[0-9a-f]+)", instruction)
            if branch and int(branch[1], 16) < address:
                body = [text for start, text in self.code if int(branch[1], 16) <= start <= address]
                loads = sum(text.startswith("LDG.E.128") for text in body)
                if loads:
                    lengths.append((len(body), len(body) / loads))
        return min(lengths)[1] if lengths else None


def launch_sizes(lanes: int) -> tuple[int, int]:
    """Threads and shared bytes of a block: launch_groups() in cuda_tuned.cu, kThreads in cuda_generic.cu."""
    if lanes == 0:
        return 256, 0
    group_bytes = 2 * (POINTS + 1) * 16
    threads = 128 if 128 // lanes * group_bytes <= 48 << 10 else 64
    return threads, threads // lanes * group_bytes


def resident_warps(architecture: str, registers: int, threads: int, shared_bytes: int) -> int | None:
    if architecture not in LIMITS:
        return None
    shared_limit, warp_limit, block_limit = LIMITS[architecture]
    warps = threads // LANES_OF_WARP
    # Registers are given to a warp in pieces of 256, shared memory to a block in pieces of 128 bytes.
    warp_registers = -(-registers * LANES_OF_WARP // 256) * 256
    block_shared = -(-(shared_bytes + RESERVED_SHARED) // 128) * 128
    blocks = min(REGISTERS // (warp_registers * warps), shared_limit // block_shared, warp_limit // warps, block_limit)
    return blocks * warps


def kernels(tool: str, binary: Path) -> dict[str, dict[str, Kernel]]:
    """By architecture and mangled name."""
    found: dict[str, dict[str, Kernel]] = {}
    kernel = Kernel("", "", 0)
    for architecture, line in _lines(tool, "--dump-resource-usage", binary):
        if match := re.match(r"\s*Function (\S+):", line):
            parts = KERNEL.search(match[1])
            assert parts is not None, match[1]
            kernel = Kernel(parts[1], TYPES[parts[2]], int(parts[3] or 0))
            found.setdefault(architecture, {})[match[1]] = kernel
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernel.registers, kernel.stack_bytes, kernel.fixed_shared_bytes = map(int, match.groups())
            if architecture >= "sm_90":  # from there on the system's part is in the number, unless that is zero
                kernel.fixed_shared_bytes = max(0, kernel.fixed_shared_bytes - RESERVED_SHARED)
    for architecture, line in _lines(tool, "--dump-sass", binary):
        if match := re.match(r"\s*Function : (\S+)", line):
            kernel = found[architecture][match[1]]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ +)?(.*?);", line):
            kernel.code.append((int(match[1], 16), match[2]))
    return found


def _lines(tool: str, option: str, binary: Path) -> Iterator[tuple[str, str]]:
    """Each line of the tool's output with the architecture that it is about."""
    output = subprocess.run([tool, option, str(binary)], capture_output=True, text=True, check=True).stdout
    architecture = ""
    for line in output.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        yield architecture, line


def row(architecture: str, kernel: Kernel) -> str:
    threads, shared = launch_sizes(kernel.lanes)
    warps = resident_warps(architecture, kernel.registers, threads, kernel.fixed_shared_bytes + shared)
    vectors = kernel.count(r"REDG?\.\S*F32x4")
    loop = kernel.loop()
    cells = [
        f"{kernel.name} {kernel.dtype}",
        kernel.lanes or "-",
        kernel.registers,
        f"{kernel.stack_bytes} ({kernel.count('LDL')} + {kernel.count('STL')})",
        f"{kernel.fixed_shared_bytes} + {shared}",
        "?" if warps is None else warps,
        len(kernel.code),
        kernel.count(r"LDG\.E\.128"),
        "-" if loop is None else f"{loop:.1f}",
        f"{vectors} + {kernel.count('RED|ATOM') - vectors}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    tool = find_cuobjdump()
    if tool is None:
        sys.exit("cuobjdump is neither on the PATH nor in triton: install the CUDA toolkit or triton")
    if not library.CUDA_BINARY.exists():
        sys.exit(f"{library.CUDA_BINARY} does not exist: build with nvcc on the PATH ({library.BUILD_COMMAND})")
    for architecture, found in sorted(kernels(tool, library.CUDA_BINARY).items()):
        print(f"\n{architecture}\n")
        print(f"| {COLUMNS.replace('|', ' | ')} |")
        print("|" + " --- |" * len(COLUMNS.split("|")))
        for kernel in sorted(
            found.values(), key=lambda kernel: (kernel.lanes == 0, kernel.name, kernel.dtype, kernel.lanes)
        ):
            print(row(architecture, kernel))


def find_cuobjdump() -> str | None:
    """From the CUDA toolkit, or the one that comes with triton."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


if __name__ == "__main__":
    main()
