#!/usr/bin/env bash
# Train on the nodes of a hostfile: DeepSpeed's launcher starts the ranks over ssh (pdsh).
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/ssh.sh HOSTFILE TRAIN_ARGUMENT...

Runs `ddetr train TRAIN_ARGUMENT...` on every node of HOSTFILE, whose lines read `HOST slots=RANKS`.
Needs pdsh here (apt-get install pdsh), ssh without a password to every node, and the same paths on all of them.

  printf 'node0 slots=8\nnode1 slots=8\n' >hostfile
  launch/ssh.sh hostfile r50 data.train=/shared/shards/train
HELP
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ -x $root/.venv/bin/python ]] && PATH=$root/.venv/bin:$PATH # in a checkout: what make set up

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
case $1 in
    --help | -h)
        usage
        exit
        ;;
esac
hostfile=$1
shift
[[ -f $hostfile ]] || { echo "ssh.sh: $hostfile: no such hostfile" >&2; exit 2; }
if [[ $(grep -cvE '^[[:space:]]*(#|$)' -- "$hostfile") -gt 1 ]] && ! command -v pdsh >/dev/null; then
    echo "ssh.sh: pdsh is missing: apt-get install pdsh" >&2
    exit 2
fi

exec python -m ddetr.launch.pdsh "$hostfile" -- train "$@"
