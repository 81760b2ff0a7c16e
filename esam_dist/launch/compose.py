"""The commands of the launchers, as lists of words: composed here, run elsewhere, printed by `--dry-run`."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

from esam_dist.launch.arguments import Job

MODULE = "esam_dist"
SETTINGS = {
    "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
    # With the shared store, torch 2.15 publishes the address of rank 0 in the first round only: a node that joins later
    # waits for it in vain, and ends the whole job after a minute.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def environment(job: Job) -> dict[str, str]:
    """What torchrun has to find in its environment; deepspeed needs nothing."""
    if job.launcher != "torchrun":
        return {}
    defaults = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.grace_seconds),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // job.ranks_per_node)),
    }
    return SETTINGS | {name: os.environ.get(name, value) for name, value in defaults.items()}


def printed(job: Job, words: list[str]) -> str:
    """`words` for a shell, with the environment that they need, and in comments what `launch` does besides."""
    besides = [
        "checks data, ports and GPUs of this node first",
        *(["compares versions and configurations of all nodes"] if job.compared else []),
        *(["gives up a rendezvous that does not answer for a minute"] if "--rdzv-backend=c10d" in words else []),
        *(["does not restart ranks that end with status 2"] if job.launcher == "torchrun" and job.max_restarts else []),
        *(["shows the ranks' logs"] if job.launcher == "deepspeed" else []),
    ]
    settings = [f"{name}={value}" for name, value in environment(job).items()]
    command = shlex.join([*(["env"] if settings else []), *settings, *words])
    return "".join(f"# launch also {line}\n" for line in besides) + command


def command(job: Job, logs: Path, facts: dict[str, str]) -> list[str]:
    """The command that starts `job` on this node; `facts` must be the same on every node (see `versions`)."""
    return torchrun(job, logs, facts) if job.launcher == "torchrun" else deepspeed(job, logs)


def torchrun(job: Job, logs: Path, facts: dict[str, str]) -> list[str]:
    """`torchrun` for one node, several nodes with numbers (static), or nodes that come and go (c10d)."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={job.ranks_per_node}"]
    if not job.several_nodes and not job.host:
        # a container's own host name need not resolve
        words += ["--standalone", f"--local-addr={job.local_address or '127.0.0.1'}"]
    elif job.fixed:
        words += [f"--nnodes={job.max_nodes}", f"--node-rank={job.node_rank}"]
        words += [f"--master-addr={job.host}", f"--master-port={job.port}"]
    else:
        nodes = f"{job.min_nodes}:{job.max_nodes}" if job.elastic else str(job.max_nodes)
        words += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={job.meeting_point}"]
        words += [f"--rdzv-id={meeting_name(job, facts)}"]
        if job.node_rank is not None:
            words += [f"--rdzv-conf=is_host={job.node_rank == 0}"]
    if job.local_address and job.host:
        words += [f"--local-addr={job.local_address}"]
    words += [f"--max-restarts={job.max_restarts}", f"--log-dir={logs}", "--tee=3"]
    return [*words, "-m", MODULE, "train", str(job.config), *job.overrides]


def deepspeed(job: Job, logs: Path) -> list[str]:
    """`deepspeed` on this machine, on the machines of a hostfile over ssh, or on each of them by hand (`--no-ssh`)."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    if job.hostfile is None:
        words += [f"--num_gpus={job.ranks_per_node}"]
    else:
        words += [f"--hostfile={job.hostfile}"]
    if job.host:
        words += [f"--master_addr={job.host}"]
    words += [f"--master_port={job.port}"]
    if not job.ssh:
        words += ["--no_ssh", f"--node_rank={job.node_rank}"]
    words += [f"--enable_each_rank_log={logs}"]
    return [*words, "--module", MODULE, "train", str(job.config), *job.overrides]


def meeting_name(job: Job, facts: dict[str, str]) -> str:
    """The rendezvous id: the job's name and a digest of `facts`, so that a node that differs never joins."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{job.name}-{digest}"
