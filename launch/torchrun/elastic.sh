#!/bin/sh
# Nodes that come and go; start it on each.   usage: elastic.sh CONFIG [section.key=value ...]
#   NODES=1:4 HEAD=node0.example JOB=digits-1 elastic.sh configs/digits_esam.yaml checkpoint.every_steps=200
# The job runs with any number of nodes in the range, from its newest checkpoint after each change: run.folder must be
# on storage that all nodes share. HEAD holds the rendezvous and is the one node that must stay.
# A node that is cut off silently needs `esam-dist launch --nnodes MIN:MAX`: torchrun alone closes the job when it is back.
set -eu
# Else torch 2.15 publishes the address of rank 0 in the first round only, and a node that joins later waits in vain.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nproc-per-node="${RANKS_PER_NODE:-gpu}" --nnodes="$NODES" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="$JOB" --max-restarts="${RESTARTS:-3}" \
    --log-dir="${LOGS:-logs}" --tee=3 -m esam_dist train "$@"
