"""What a forked process of tests/processes.py does to itself before it becomes `ddetr`.

Python has calls for neither capabilities nor namespaces (os.unshare comes with 3.12).
"""

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
PR_SET_KEEPCAPS, CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN = 8, 0x20080522, 2, 21


def need_mounts() -> None:
    """Skips the test where this account may not mount: it is not root, or root of a container without CAP_SYS_ADMIN."""
    (effective,) = re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    if not int(effective, 16) >> CAP_SYS_ADMIN & 1:
        pytest.skip("a mount of its own needs CAP_SYS_ADMIN, which root has outside of most containers")


def become(account: int, variables: Mapping[str, str]) -> None:
    """Another account without a name and, unless `variables` say so, without a home.

    It reads everything, which the interpreter may need, and writes as that account may.
    """
    for name in [name for name in os.environ if name.startswith(("HOME", "XDG", "HF_", "USER", "COVERAGE"))]:
        del os.environ[name]
    os.environ.update(variables)
    if coverage := sys.modules.get("coverage"):  # it writes into the repository, where that account may not
        coverage.Coverage.save = lambda measured: None
    _checked(_libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(account, account, account)
    os.setresuid(account, account, account)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    reads = 1 << CAP_DAC_READ_SEARCH
    data = (ctypes.c_uint32 * 6)(reads, reads, 0, 0, 0, 0)  # effective, permitted, inheritable; again for 32 and more
    _checked(_libc.capset(header, data))


def mount_memory(place: Path, size: int) -> None:
    """A file system of `size` bytes of memory at `place`, which no other process sees."""
    _checked(_libc.unshare(CLONE_NEWNS))
    _checked(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _checked(_libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
