"""`python -m ddetr.launch.lifeline PID MODULE ARGUMENTS...`: run a module as a program that ends with its parent, PID.

Ray kills actors without a word to them: a rank that lived on would hold a GPU that Ray gives to the next one.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a module of this folder as a program that ends with the calling process."""
    return [sys.executable, "-m", f"{__package__}.lifeline", str(os.getpid()), f"{__package__}.{module}", *arguments]


def main() -> None:
    """Run the module as `python -m MODULE ARGUMENTS...` would; the kernel kills it when the parent is gone."""
    parent, module = sys.argv[1:3]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(f"process {parent}, which started {module}, is gone")
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
