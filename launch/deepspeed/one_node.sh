#!/bin/sh
# DeepSpeed's own launcher on this machine.   usage: one_node.sh CONFIG engine.name=deepspeed [section.key=value ...]
set -eu
exec deepspeed --no_local_rank --num_gpus="${RANKS_PER_NODE:-1}" --master_port="${PORT:-29500}" \
    --enable_each_rank_log="${LOGS:-logs}" --module esam_dist train "$@"
