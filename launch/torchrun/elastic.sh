#!/bin/sh
# Nodes that come and go; start it on each.   usage: elastic.sh CONFIG [section.key=value ...]
#   NODES=1:4 HEAD=node0.example JOB=digits-1 elastic.sh configs/digits_esam.yaml checkpoint.every_steps=200
# The job runs with any number of nodes in the range, from its newest checkpoint after each change: run.folder must be
# on storage that all nodes share. HEAD holds the rendezvous and is the one node that must stay.
set -eu
exec torchrun --nproc-per-node="${RANKS_PER_NODE:-gpu}" --nnodes="$NODES" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="$JOB" --max-restarts="${RESTARTS:-3}" \
    --log-dir="${LOGS:-logs}" --tee=3 -m esam_dist train "$@"
