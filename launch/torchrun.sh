#!/usr/bin/env bash
# Train on several nodes with torchrun: run this on every node, or let Slurm or Kubernetes do it.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/torchrun.sh --nodes N --node-rank R --master HOST[:PORT] [--ranks N] TRAIN_ARGUMENT...
       launch/torchrun.sh --nodes MIN:MAX --master HOST[:PORT] [--restarts N] [--ranks N] TRAIN_ARGUMENT...

Runs `ddetr train TRAIN_ARGUMENT...` on this node as part of a run over several.

  --nodes N         fixed membership: the run starts once all N nodes are there
  --nodes MIN:MAX   elastic: goes on with fewer nodes when one is lost, and takes up new ones
  --node-rank R     this node's number, 0..N-1, with fixed membership; 0 is the node named by --master
  --master HOST     where the nodes meet; HOST is one of them. Port 29500 unless given as HOST:PORT
  --ranks N         ranks on this node (default: one for each GPU, or 1 without a GPU)
  --restarts N      elastic: how often lost ranks are started again (default 3)

  launch/torchrun.sh --nodes 4 --node-rank 0 --master node0 r50 data.train=/shared/shards/train
  launch/torchrun.sh --nodes 2:4 --master node0 --resume /shared/runs/r50-0001
HELP
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -x $here/../.venv/bin/python ]] && PATH=$here/../.venv/bin:$PATH # in a checkout: what make set up

nodes='' node_rank='' master='' ranks='' restarts=3
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
while [[ $# -gt 0 ]]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --nodes) nodes=${2:?--nodes needs N or MIN:MAX}; shift 2 ;;
        --node-rank) node_rank=${2:?--node-rank needs a number}; shift 2 ;;
        --master) master=${2:?--master needs HOST or HOST:PORT}; shift 2 ;;
        --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
        --restarts) restarts=${2:?--restarts needs a number}; shift 2 ;;
        *) break ;;
    esac
done
[[ -n $nodes ]] || { echo "torchrun.sh: --nodes is needed" >&2; exit 2; }
[[ -n $master ]] || { echo "torchrun.sh: --master is needed" >&2; exit 2; }
[[ $master == *:* ]] || master=$master:29500
if [[ -z $ranks ]]; then
    ranks=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi

arguments=(--nproc-per-node "$ranks" --nnodes "$nodes")
if [[ $nodes == *:* ]]; then
    arguments+=(--rdzv-backend c10d --rdzv-endpoint "$master" --rdzv-id ddetr --max-restarts "$restarts")
else
    [[ -n $node_rank ]] || { echo "torchrun.sh: --node-rank is needed with --nodes $nodes" >&2; exit 2; }
    arguments+=(--node-rank "$node_rank" --master-addr "${master%:*}" --master-port "${master##*:}")
fi
exec python -m torch.distributed.run "${arguments[@]}" --module ddetr.launch.cli train "$@"
