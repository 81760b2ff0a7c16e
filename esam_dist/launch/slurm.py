"""The sbatch script: one task per node, which joins the others by `esam-dist launch` itself."""

from __future__ import annotations

import shlex
from pathlib import Path
from string import Template

from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job

SCRIPT = Template("""\
#!/bin/bash
# $name: $nodes node(s), $ranks rank(s) each. Submit with: sbatch THIS_FILE
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@$grace
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$logs/slurm-%j.log
$options
set -euo pipefail

# The first node of the allocation is the meeting point; the job's number keeps the ports of two jobs apart.
host=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
port=$$((20000 + SLURM_JOB_ID % 10000))

# sbatch signals the steps before the time is up: the run writes a checkpoint and ends with status 143.
# kill-on-bad-exit: a node that fails must not leave the others waiting for it.
exec srun --kill-on-bad-exit=1 bash -c 'exec python -m esam_dist launch \\
    --nnodes="$$SLURM_NNODES" --node-rank="$$SLURM_NODEID" --nproc-per-node=$ranks \\
    --rendezvous="$$0" --name="$$SLURM_JOB_NAME-$$SLURM_JOB_ID" --grace=$grace \\
    --logs=$logs $config' "$$host:$$port"
""")


def render(job: Job, logs: Path, options: list[str]) -> str:
    """The script for `job`; `options` are further sbatch options. Raises UserError for what it cannot hold."""
    words = [str(job.config), *job.overrides]
    for word in [*words, *options, str(logs), job.name]:
        if set(word) & set("'\"$`\\\n"):
            raise UserError(f"{word!r}: quotes, $, backslashes and line breaks cannot stand in a Slurm script")
    if job.elastic:
        raise UserError(f"--nnodes {job.min_nodes}:{job.max_nodes}: Slurm allocates a fixed number; give one number")
    return SCRIPT.substitute(
        name=job.name,
        nodes=job.max_nodes,
        ranks=job.ranks_per_node,
        grace=job.grace_seconds,
        logs=shlex.quote(str(logs)),
        config=" ".join(f'"{word}"' for word in words),
        options="".join(f"#SBATCH {option}\n" for option in options),
    )
