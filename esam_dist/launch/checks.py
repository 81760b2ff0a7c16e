"""What is looked at before anything starts: each failure is one line, and exit status 2."""

from __future__ import annotations

import platform
import socket
from importlib.metadata import PackageNotFoundError, version

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job


def check(job: Job, cfg: config.Config) -> None:
    """Look at data, ports and GPUs of this node. Raises UserError for the first thing that would fail later."""
    check_data(cfg)
    check_ports(job, cfg)
    if job.launcher == "torchrun":
        check_gpus(job)


def check_data(cfg: config.Config) -> None:
    """The data folder is there and not empty."""
    path = cfg.data.path
    if not path.is_dir() or not any(path.iterdir()):
        raise UserError(f"data.path = {path}: no data there on this node; run `esam-dist prepare` or mount it")


def check_ports(job: Job, cfg: config.Config) -> None:
    """Nobody listens where the metrics endpoints will, nor where this node will host the rendezvous."""
    for local_rank in range(job.ranks_per_node if cfg.metrics.port else 0):
        port = cfg.metrics.port + local_rank
        if not _free(cfg.metrics.bind, port):
            raise UserError(f"metrics.port = {cfg.metrics.port}: {port} is taken; choose another, or 0 for no endpoint")
    hosts_rendezvous = job.host and job.several_nodes and job.node_rank == 0
    if hosts_rendezvous and not _free("", job.port):
        raise UserError(f"--rendezvous {job.host}:{job.port}: the port is taken on node 0; choose another")


def check_gpus(job: Job) -> None:
    """No more ranks than GPUs, where there are GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and job.ranks_per_node > gpus:
        raise UserError(f"--nproc-per-node {job.ranks_per_node}: this node has {gpus} GPUs; give {gpus} or fewer")


def versions(cfg: config.Config) -> dict[str, str]:
    """What has to be the same on all nodes: the software, and the configuration but for the node's own paths."""
    software = {name: _version(name) for name in ("esam-dist", "torch", "torchvision", "deepspeed")}
    local = {"data": {"path"}, "run": {"folder"}, "metrics": {"bind"}}
    return software | {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "config": config.dump(
            cfg.model_copy(update={section: _without(cfg, section, local[section]) for section in local})
        ),
    }


def _without(cfg: config.Config, section: str, keys: set[str]) -> config.Section:
    part: config.Section = getattr(cfg, section)
    return part.model_copy(update={key: type(part).model_fields[key].default for key in keys})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from its source folder"


def _free(host: str, port: int) -> bool:
    if port > 65535:
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
