#!/usr/bin/env bash
# Train on several nodes with torchrun: run this on every node, or let Slurm or Kubernetes do it.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/torchrun.sh --nodes N --master HOST[:PORT] [--node-rank R | --restarts N] [--ranks N] TRAIN_ARGUMENT...

Runs `ddetr train TRAIN_ARGUMENT...` on this node as part of a run over N nodes.

  --nodes N         number of nodes; the run starts once all are there. MIN:MAX without --node-rank: with any number
                    of them, and continues with those that are left when one is lost (not the --master)
  --master HOST     where the nodes meet: one of them. Port 29500 unless given as HOST:PORT
  --node-rank R     this node's number, 0..N-1; 0 is the node named by --master
  --ranks N         ranks on this node (default: one for each GPU, or 1 without a GPU)
  --restarts N      without --node-rank: how often all ranks start again after one was lost (default 3)

With --node-rank the nodes are fixed and a lost one ends the run. Without, nodes are numbered as they arrive and
another node may take a lost one's place; train.auto_resume with train.name lets the restarted ranks go on from the newest
checkpoint, also when they are fewer or more. train.batch_size must divide among them.

  launch/torchrun.sh --nodes 4 --master node0 --node-rank 0 r50 data.train=/shared/shards/train
  launch/torchrun.sh --nodes 2:4 --master node0 r50 data.train=/shared/shards/train train.name=r50 train.auto_resume=true
HELP
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ -x $root/.venv/bin/python ]] && PATH=$root/.venv/bin:$PATH # in a checkout: what make set up

nodes='' node_rank='' master='' ranks='' restarts=3
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
while [[ $# -gt 0 ]]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --nodes) nodes=${2:?--nodes needs a number}; shift 2 ;;
        --node-rank) node_rank=${2:?--node-rank needs a number}; shift 2 ;;
        --master) master=${2:?--master needs HOST or HOST:PORT}; shift 2 ;;
        --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
        --restarts) restarts=${2:?--restarts needs a number}; shift 2 ;;
        *) break ;;
    esac
done
[[ -n $nodes ]] || { echo "torchrun.sh: --nodes is needed" >&2; exit 2; }
[[ -n $master ]] || { echo "torchrun.sh: --master is needed" >&2; exit 2; }
[[ $nodes != *:* || -z $node_rank ]] || { echo "torchrun.sh: --nodes MIN:MAX goes without --node-rank" >&2; exit 2; }
[[ $master == *:* ]] || master=$master:29500
if [[ -z $ranks ]]; then
    ranks=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi

arguments=(--nproc-per-node "$ranks" --nnodes "$nodes")
if [[ -n $node_rank ]]; then
    arguments+=(--node-rank "$node_rank" --master-addr "${master%:*}" --master-port "${master##*:}")
else
    arguments+=(--rdzv-backend c10d --rdzv-endpoint "$master" --rdzv-id ddetr --max-restarts "$restarts")
fi
# A rank that gets a stop signal saves first, for which torchrun would leave it 30 s. A frozen one is waited for as long.
# SIGUSR1 would end torchrun and leave its ranks behind.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
arguments+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
exec python -m ddetr.launch.torchrun "${arguments[@]}" -- train "$@"
