#!/bin/sh
# The machines of a hostfile (lines "HOST slots=N"), started from here over ssh without a password.
#   HOSTFILE=hosts HEAD=node0.example hostfile.sh CONFIG engine.name=deepspeed [section.key=value ...]
# The folder that this is started in, the environment and the data must be at the same path on all of them.
set -eu
exec deepspeed --no_local_rank --hostfile="$HOSTFILE" --master_addr="$HEAD" --master_port="${PORT:-29500}" \
    --enable_each_rank_log="${LOGS:-logs}" --module esam_dist train "$@"
