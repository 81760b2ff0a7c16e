"""The options of `esam-dist launch`, and the job that they describe."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from esam_dist.errors import UserError

PORT = 29500
HERE = ("torchrun", "deepspeed")
# Options that not every launcher takes: given to another they are refused, so that none is silently without effect.
TAKEN_BY = {
    "node_rank": HERE,
    "rendezvous": HERE,
    "no_checks": HERE,
    "local_addr": ("torchrun",),
    "name": ("torchrun", "slurm"),
    "max_restarts": ("torchrun", "slurm", "kubernetes"),
    "logs": (*HERE, "slurm"),
    "hostfile": ("deepspeed",),
    "no_ssh": ("deepspeed",),
    "sbatch": ("slurm",),
    "image": ("kubernetes",),
    "overlay": ("kubernetes",),
    "namespace": ("kubernetes",),
}


@dataclass(frozen=True)
class Job:
    """What is to be started, on how many nodes, and how they meet."""

    launcher: str
    config: Path
    overrides: tuple[str, ...]
    min_nodes: int
    max_nodes: int
    ranks_per_node: int  # 0: what each node of Slurm, or the Kubernetes overlay, has
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
    def compared(self) -> bool:
        """Whether the nodes compare versions and configurations first (elsewhere the rendezvous' name differs)."""
        return (self.launcher == "torchrun" and self.fixed) or not self.ssh

    @property
    def meeting_point(self) -> str:
        """HOST:PORT, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

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
    parser.add_argument("--nnodes", metavar="N|MIN:MAX", help="nodes of the job (default: 1); MIN:MAX is elastic")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks per node (default: its GPUs)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="this node's number; node 0 is the rendezvous host")
    parser.add_argument("--rendezvous", metavar="HOST[:PORT]", help=f"where nodes meet (port {PORT})")
    parser.add_argument("--local-addr", metavar="HOST", help="this node's address, where its host name does not tell")
    parser.add_argument("--name", help="job name, the same on every node (default: esam)")
    parser.add_argument("--max-restarts", type=int, metavar="N", help="after a lost rank (default: 0; elastic: 3)")
    parser.add_argument("--grace", type=int, metavar="SECONDS", help="for a last checkpoint at the end (default: 300)")
    parser.add_argument("--hostfile", type=Path, help="deepspeed: lines 'HOST slots=N'")
    parser.add_argument("--no-ssh", action="store_const", const=True, help="deepspeed: started on every node by hand")
    parser.add_argument("--logs", type=Path, help="folder of per-rank logs (default: logs/ in the run folder)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    parser.add_argument("--no-checks", action="store_const", const=True, help="not of data, ports, GPUs, versions")
    parser.add_argument("--image", help="kubernetes: container image")
    parser.add_argument("--overlay", help="kubernetes: base (default), jobset, kubeflow-trainer, ..., or a folder")
    parser.add_argument("--namespace", help="kubernetes: namespace")
    parser.add_argument("--sbatch", action="append", metavar="OPTION", help="slurm: e.g. --sbatch=-pgpu")


def job(args: argparse.Namespace) -> Job:
    """The job that the parsed options describe. Raises UserError for options that do not go together."""
    _check_taken(args)
    slots = None if args.hostfile is None else _slots(args.hostfile)
    for option in ("nnodes", "nproc_per_node"):
        if slots is not None and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: --hostfile says how many; leave one of them out")
    nodes = args.nnodes or "1"
    low, high = _nodes(nodes) if slots is None else (len(slots), len(slots))
    host, port = _rendezvous(args.rendezvous or "")
    if args.launcher == "deepspeed" and slots is None and high > 1:
        raise UserError(
            f"--nnodes {nodes}: deepspeed takes a fixed number of nodes from a hostfile; give --hostfile, and --no-ssh "
            "where there is no ssh, or use --with torchrun"
        )
    if high > 1 and args.launcher == "torchrun" and not host:
        raise UserError(f"--nnodes {nodes}: the nodes must meet; give --rendezvous HOST:PORT of node 0")
    if args.no_ssh and (slots is None or args.node_rank is None or not host):
        raise UserError(
            "--no-ssh: also give --hostfile, --node-rank and --rendezvous, so that the nodes find each other"
        )
    if args.node_rank is not None and not 0 <= args.node_rank < high:
        raise UserError(f"--node-rank {args.node_rank}: must lie between 0 and {high - 1}")
    if args.nproc_per_node is not None and args.nproc_per_node < 0:
        raise UserError(f"--nproc-per-node {args.nproc_per_node}: give a number of ranks, or 0 for one per GPU")
    return Job(
        launcher=args.launcher,
        config=args.config,
        overrides=tuple(args.overrides),
        min_nodes=low,
        max_nodes=high,
        ranks_per_node=slots[args.node_rank or 0] if slots else args.nproc_per_node or _default_ranks(args.launcher),
        node_rank=args.node_rank,
        host=host,
        port=port,
        name=args.name or "esam",
        max_restarts=_not_negative("--max-restarts", args.max_restarts, 3 if low != high else 0),
        local_address=args.local_addr,
        hostfile=args.hostfile,
        ssh=not args.no_ssh,
        grace_seconds=_not_negative("--grace", args.grace, 300),
    )


def _check_taken(args: argparse.Namespace) -> None:
    for name, launchers in TAKEN_BY.items():
        if getattr(args, name) is not None and args.launcher not in launchers:
            raise UserError(
                f"--{name.replace('_', '-')}: has no effect on {args.launcher}; leave it out, or use --with "
                f"{' or '.join(launchers)}"
            )


def _not_negative(option: str, value: int | None, default: int) -> int:
    if value is not None and value < 0:
        raise UserError(f"{option} {value}: give 0 or more")
    return default if value is None else value


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        pair = int(low), int(high or low)
    except ValueError:
        pair = (0, 0)
    if not 1 <= pair[0] <= pair[1]:
        raise UserError(f"--nnodes {text}: give a number of nodes such as 2, or a range such as 1:4")
    return pair


def _slots(path: Path) -> list[int]:
    """Ranks of each host of a hostfile, as DeepSpeed reads it."""
    try:
        lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error}); give lines 'HOST slots=N'") from None
    slots: dict[str, int] = {}
    for words in filter(None, lines):
        match = re.fullmatch(r"(\S+) slots=(\d+)", " ".join(words))
        if match is None or not int(match[2]):
            raise UserError(f"--hostfile {path}: {' '.join(words)!r} is not of the form 'HOST slots=N', N at least 1")
        if match[1] in slots:
            raise UserError(f"--hostfile {path}: {match[1]} stands there twice; give one line with all its slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"--hostfile {path}: is empty; give at least one line 'HOST slots=N'")
    return list(slots.values())


def _rendezvous(text: str) -> tuple[str, int]:
    """Host and port. An IPv6 address stands in brackets, which only without a port may be left out."""
    if not text or _is_ipv6(text):
        return text, PORT
    match = re.fullmatch(r"(\[(?P<address>.*)\]|(?P<name>[^\[\]:\s]+))(:(?P<port>[0-9]{1,5}))?", text)
    known = match is not None and (match["name"] is not None or _is_ipv6(match["address"]))
    if match is None or not known or not 0 < int(match["port"] or PORT) < 65536:
        raise UserError(f"--rendezvous {text}: give HOST or HOST:PORT of node 0; an IPv6 address as [ADDRESS]:PORT")
    return match["name"] or match["address"], int(match["port"] or PORT)


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def _default_ranks(launcher: str) -> int:
    if launcher not in HERE:
        return 0  # Slurm's nodes count their own GPUs, a Kubernetes overlay has its number; here may be none
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 1
    import torch

    return torch.cuda.device_count() or 1
