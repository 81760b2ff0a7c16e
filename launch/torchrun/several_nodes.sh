#!/bin/sh
# A fixed number of nodes; start it on each.   usage: several_nodes.sh CONFIG [section.key=value ...]
#   NODES=3 NODE_RANK=0 HEAD=node0.example RANKS_PER_NODE=8 several_nodes.sh configs/imagenet_resnet50_esam.yaml
# HEAD is the host of NODE_RANK 0; its port PORT must be reachable, and all ports between the nodes.
set -eu
exec torchrun --nproc-per-node="${RANKS_PER_NODE:-gpu}" --nnodes="$NODES" --node-rank="$NODE_RANK" \
    --master-addr="$HEAD" --master-port="${PORT:-29500}" --max-restarts=0 \
    --log-dir="${LOGS:-logs}" --tee=3 -m esam_dist train "$@"
