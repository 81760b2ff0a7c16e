#!/bin/sh
# All GPUs of this machine.   usage: one_node.sh CONFIG [section.key=value ...]
# The same with checks, rank prefixes and the job's exit status: esam-dist launch CONFIG ...
set -eu
exec torchrun --nproc-per-node="${RANKS_PER_NODE:-gpu}" --standalone --local-addr=127.0.0.1 --max-restarts=0 \
    --log-dir="${LOGS:-logs}" --tee=3 -m esam_dist train "$@"
