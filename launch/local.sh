#!/usr/bin/env bash
# Train on this machine: one rank for each GPU, or as many CPU ranks as asked for.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/local.sh [--ranks N] TRAIN_ARGUMENT...

Runs `ddetr train TRAIN_ARGUMENT...` in N ranks of this machine (default: one for each GPU, or 1 without a GPU).
Ctrl-C saves a checkpoint on every rank and exits.

  launch/local.sh r50 data.train=shards/train data.validation=shards/val
  launch/local.sh --ranks 2 tiny data.train=shards/train
  launch/local.sh --resume runs/r50-0001
HELP
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ -x $root/.venv/bin/python ]] && PATH=$root/.venv/bin:$PATH # in a checkout: what make set up

ranks=
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
case $1 in
    --help | -h)
        usage
        exit
        ;;
    --ranks)
        ranks=${2:?--ranks needs a number}
        shift 2
        ;;
esac
if [[ -z $ranks ]]; then
    ranks=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi

python -m ddetr.launch.cli train --dry-run "$@" >/dev/null # a mistake is reported once, not by every rank
# A rank that gets a stop signal saves first, for which torchrun would leave it 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# SIGUSR1, too, lets the ranks save and stop; by itself it would end torchrun and leave them behind.
exec python -m ddetr.launch.torchrun --standalone --nproc-per-node "$ranks" \
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" -- train "$@"
