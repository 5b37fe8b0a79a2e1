#!/usr/bin/env bash
# Makes the virtual environment that `make` works in, or says in one line each what this machine lacks.
set -euo pipefail

if [[ $# -ne 1 || $1 == --help ]]; then
    cat <<'HELP'
usage: launch/bootstrap.sh VENV

Creates the virtual environment VENV with the first Python >= 3.11 found (or with $PYTHON).
With OFFLINE=1 the packages of that Python are visible inside, for machines without a package registry.
HELP
    exit $(($# != 1))
fi
venv=$1
lacking=()

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done

if [[ -z $python ]]; then
    lacking+=("Python >= 3.11 is needed (${PYTHON:-python3 is $(python3 --version 2>&1 || true)}): apt-get install python3 (Debian 12 or newer), or set PYTHON=/path/to/python3.11")
else
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        lacking+=("Python's venv and ensurepip are missing: apt-get install python3-venv")
fi
printf '#include <concepts>\n#include <thread>\nint main() {}\n' |
    ${CXX:-g++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
    lacking+=("a C++20 compiler is missing (${CXX:-g++} does not compile a C++20 file): apt-get install g++")

if [[ ${#lacking[@]} -gt 0 ]]; then
    printf 'ddetr: %s\n' "${lacking[@]}" >&2
    exit 1
fi

"$python" -m venv "$venv"
if [[ -n ${OFFLINE:-} ]]; then
    # A .pth line rather than --system-site-packages: $python may itself live in a virtual environment.
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_interpreter.pth"
fi
