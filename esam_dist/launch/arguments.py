"""The options of `esam-dist launch`, and the job that they describe."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from esam_dist.errors import UserError

PORT = 29500


@dataclass(frozen=True)
class Job:
    """What is to be started, on how many nodes, and how they meet."""

    launcher: str
    config: Path
    overrides: tuple[str, ...]
    min_nodes: int
    max_nodes: int
    ranks_per_node: int
    node_rank: int | None
    host: str
    port: int
    name: str
    max_restarts: int
    local_address: str | None
    hostfile: Path | None
    ssh: bool
    grace_seconds: int

    @property
    def elastic(self) -> bool:
        """Whether nodes may come and go."""
        return self.min_nodes < self.max_nodes

    @property
    def fixed(self) -> bool:
        """Whether the nodes are numbered and never restart, so that torchrun's static rendezvous will do."""
        return self.several_nodes and self.node_rank is not None and not self.elastic and self.max_restarts == 0

    @property
    def several_nodes(self) -> bool:
        """Whether nodes have to meet."""
        return self.max_nodes > 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist launch` on `parser`."""
    parser.add_argument("config", type=Path, help="YAML file, the same on every node")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for `esam-dist train`")
    parser.add_argument("--with", dest="launcher", choices=("torchrun", "deepspeed", "slurm", "kubernetes"),
                        default="torchrun", help="slurm and kubernetes print what sbatch and kubectl take")  # fmt: skip
    parser.add_argument("--nnodes", default="1", metavar="N|MIN:MAX", help="nodes of the job; MIN:MAX is elastic")
    parser.add_argument("--nproc-per-node", type=int, default=0, metavar="N", help="ranks per node (default: its GPUs)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="this node's number; node 0 is the rendezvous host")
    parser.add_argument("--rendezvous", default="", metavar="HOST[:PORT]", help=f"where nodes meet (port {PORT})")
    parser.add_argument("--local-addr", metavar="HOST", help="this node's address, where its host name does not tell")
    parser.add_argument("--name", default="esam", help="job name, the same on every node")
    parser.add_argument("--max-restarts", type=int, help="restarts after a lost rank (default: 0; elastic: 3)")
    parser.add_argument("--grace", type=int, default=300, metavar="SECONDS", help="for a last checkpoint at the end")
    parser.add_argument("--hostfile", type=Path, help="deepspeed: lines 'HOST slots=N'")
    parser.add_argument("--no-ssh", action="store_true", help="deepspeed: this command is started on every node")
    parser.add_argument("--logs", type=Path, help="folder of per-rank logs (default: logs/ in the run folder)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    parser.add_argument("--no-checks", action="store_true", help="start without looking at data, ports, GPUs, versions")
    parser.add_argument("--image", help="kubernetes: container image")
    parser.add_argument("--overlay", default="base", help="kubernetes: base, jobset, kubeflow-trainer, or a folder")
    parser.add_argument("--namespace", help="kubernetes: namespace")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: e.g. --sbatch=-pgpu")


def job(args: argparse.Namespace) -> Job:
    """The job that the parsed options describe. Raises UserError for options that do not go together."""
    low, high = _nodes(args.nnodes) if args.hostfile is None else _hosts(args.hostfile)
    host, port = _rendezvous(args.rendezvous)
    in_this_process = args.launcher in ("torchrun", "deepspeed")
    if high > 1 and in_this_process and not args.hostfile and not host:
        raise UserError(f"--nnodes {args.nnodes}: the nodes must meet; give --rendezvous HOST:PORT of node 0")
    if args.hostfile is not None and args.launcher != "deepspeed":
        raise UserError(f"--hostfile {args.hostfile}: is read by deepspeed; add --with deepspeed")
    if args.launcher == "deepspeed" and low != high:
        raise UserError(f"--nnodes {args.nnodes}: deepspeed takes a fixed number of nodes; use --with torchrun")
    if args.no_ssh and (args.hostfile is None or args.node_rank is None or not host):
        raise UserError(
            "--no-ssh: also give --hostfile, --node-rank and --rendezvous, so that the nodes find each other"
        )
    if args.node_rank is not None and not 0 <= args.node_rank < high:
        raise UserError(f"--node-rank {args.node_rank}: must lie between 0 and {high - 1}")
    if args.nproc_per_node < 0:
        raise UserError(f"--nproc-per-node {args.nproc_per_node}: give a number of ranks, or 0 for one per GPU")
    restarts = (3 if low != high else 0) if args.max_restarts is None else args.max_restarts
    return Job(
        launcher=args.launcher,
        config=args.config,
        overrides=tuple(args.overrides),
        min_nodes=low,
        max_nodes=high,
        ranks_per_node=args.nproc_per_node or _default_ranks(args.launcher),
        node_rank=args.node_rank,
        host=host,
        port=port,
        name=args.name,
        max_restarts=restarts,
        local_address=args.local_addr,
        hostfile=args.hostfile,
        ssh=not args.no_ssh,
        grace_seconds=args.grace,
    )


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        pair = int(low), int(high or low)
    except ValueError:
        pair = (0, 0)
    if not 1 <= pair[0] <= pair[1]:
        raise UserError(f"--nnodes {text}: give a number of nodes such as 2, or a range such as 1:4")
    return pair


def _hosts(path: Path) -> tuple[int, int]:
    try:
        lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error.strerror}); give lines 'HOST slots=N'") from None
    hosts = [words for words in lines if words]
    if not hosts or any(len(words) != 2 or not words[1].startswith("slots=") for words in hosts):
        raise UserError(f"--hostfile {path}: give at least one line, each of the form 'HOST slots=N'")
    return len(hosts), len(hosts)


def _rendezvous(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(PORT))
    if not port.isdigit() or not 0 < int(port) < 65536 or (text and not host):
        raise UserError(f"--rendezvous {text}: give HOST or HOST:PORT of node 0")
    return host, int(port)


def _default_ranks(launcher: str) -> int:
    if launcher == "slurm":
        return 0  # every node counts its own GPUs; the one that renders the script may have none
    return (_num_gpus() if launcher in ("torchrun", "deepspeed") else 0) or 1


def _num_gpus() -> int:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    import torch

    return torch.cuda.device_count()
