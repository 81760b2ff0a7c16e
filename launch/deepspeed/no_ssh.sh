#!/bin/sh
# The machines of a hostfile, where no ssh is allowed: start it on each.
#   HOSTFILE=hosts NODE_RANK=0 HEAD=node0.example no_ssh.sh CONFIG engine.name=deepspeed [section.key=value ...]
set -eu
exec deepspeed --no_local_rank --hostfile="$HOSTFILE" --master_addr="$HEAD" --master_port="${PORT:-29500}" \
    --no_ssh --node_rank="$NODE_RANK" --enable_each_rank_log="${LOGS:-logs}" --module esam_dist train "$@"
