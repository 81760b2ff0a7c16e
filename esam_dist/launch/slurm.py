"""The sbatch script: one task per node, which joins the others by `esam-dist launch` itself."""

from __future__ import annotations

import string
from pathlib import Path
from string import Template

from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job

SCRIPT = Template("""\
#!/bin/bash
# $name: $nodes node(s), $each each. Submit with: sbatch THIS_FILE, where `python` is the one that has esam_dist.
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@$grace
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
$options
set -euo pipefail

# The first node of the allocation is the meeting point; the job's number keeps the ports of two jobs apart.
hosts=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST")
meeting=$${hosts%%$$'\\n'*}:$$((20000 + SLURM_JOB_ID % 10000))
stopped=$$(mktemp)
trap 'rm -f "$$stopped"' EXIT

# kill-on-bad-exit: a node that fails must not leave the others waiting for it. srun returns the highest status, and
# those others end with 143: they count as 0, or they would hide the status of the one that failed.
# cpus-per-task: srun does not take it over from sbatch.
srun --kill-on-bad-exit=1 $${SLURM_CPUS_PER_TASK:+--cpus-per-task="$$SLURM_CPUS_PER_TASK"} bash -c 'trap : TERM
    python -m esam_dist launch \\
        --nnodes="$$SLURM_NNODES" --node-rank="$$SLURM_NODEID"$sizes \\
        --rendezvous="$$0" --name="$$SLURM_JOB_NAME-$$SLURM_JOB_ID" --grace=$grace \\
        --logs="$logs" $config && exit
    status=$$?
    [ "$$status" = 143 ] || exit "$$status"
    [ "$$SLURM_NODEID" != 0 ] || echo yes > "$$1"' "$$meeting" "$$stopped"

# Slurm signals the nodes before the time is up and when it preempts: they write a checkpoint and end with 143. A job
# that ends by itself is not queued again by Slurm, so this one asks for it, and goes on from there. scancel ends it.
[ -s "$$stopped" ] || exit 0
scontrol requeue "$$SLURM_JOB_ID" || echo "not queued again; sbatch this file to go on"
exit 143
""")


def render(job: Job, logs: Path, options: list[str]) -> str:
    """The script for `job`; `options` are further sbatch options. Raises UserError for what it cannot hold."""
    words = [str(job.config), *job.overrides]
    if set(job.name) & set(string.whitespace):
        raise UserError(f"--name {job.name!r}: Slurm takes a name without blanks; give another")
    for word in [*words, *options, str(logs), job.name]:
        if set(word) & set("'\"$`\\\n"):
            raise UserError(f"{word!r}: quotes, $, backslashes and line breaks cannot stand in a Slurm script")
    if job.elastic:
        raise UserError(f"--nnodes {job.min_nodes}:{job.max_nodes}: Slurm allocates a fixed number; give one number")
    return SCRIPT.substitute(
        name=job.name,
        nodes=job.max_nodes,
        each=f"{job.ranks_per_node} rank(s)" if job.ranks_per_node else "a rank per GPU",
        sizes=(f" --nproc-per-node={job.ranks_per_node}" if job.ranks_per_node else "")
        + (f" --max-restarts={job.max_restarts}" if job.max_restarts else ""),
        grace=job.grace_seconds,
        logs=logs,
        config=" ".join(f'"{word}"' for word in words),
        options="".join(f"#SBATCH {option}\n" for option in options),
    )
