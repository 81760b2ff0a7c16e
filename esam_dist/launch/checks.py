"""What is looked at before anything starts: each failure is one line, and exit status 2."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import socket
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job
from esam_dist.section import Section

MAX_PORT = 65535
ANSWER_SECONDS = 3


def check(job: Job, cfg: config.Config) -> None:
    """Look at data, ports and GPUs of this node. Raises UserError for the first thing that would fail later."""
    check_data(cfg)
    head = is_head(job)
    if head or job.hostfile is None or not job.ssh:  # over ssh no rank need run where the command is given
        check_metrics_ports(job, cfg)
        check_gpus(job)
    if head:
        check_rendezvous_port(job)


def check_data(cfg: config.Config) -> None:
    """The data folder is there, can be read, and is not empty."""
    path = cfg.data.path
    try:
        found = path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise UserError(
            f"data.path = {path}: cannot be read on this node ({error.strerror}); let user {os.geteuid()} read it"
        ) from None
    if not found:
        raise UserError(f"data.path = {path}: no data there on this node; run `esam-dist prepare` or mount it")


def check_metrics_ports(job: Job, cfg: config.Config) -> None:
    """Each rank of this node can listen at `metrics.bind`, and nobody does already."""
    first, bind = cfg.metrics.port, cfg.metrics.bind
    last = first + job.ranks_per_node - 1
    if first and last > MAX_PORT:
        raise UserError(
            f"metrics.port = {first}: the last of {job.ranks_per_node} ranks would listen at {last}, above {MAX_PORT}; "
            "choose a lower one"
        )
    for port in range(first, last + 1) if first else ():
        error = refusal(bind, port)
        if error is None:
            continue
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"metrics.port = {first}: {port} is taken; choose another, or 0 for no endpoint")
        if error.errno == errno.EACCES:
            raise UserError(f"metrics.port = {first}: {port} is for root only; choose one above 1023")
        raise UserError(
            f"metrics.bind = {bind}: no rank can listen there ({error.strerror}); give an address of this node, "
            "127.0.0.1 for itself alone, or 0.0.0.0 for all that reach it"
        )


def check_rendezvous_port(job: Job) -> None:
    """Nobody listens where this node is to: the nodes, or the ranks, meet there."""
    error = refusal("", job.port)
    # An agent without a number may be the second on this machine: it joins the first one's rendezvous.
    if error is None or (job.launcher == "torchrun" and job.node_rank is None and _is_rendezvous(job)):
        return
    given = f"--rendezvous {job.meeting_point}" if job.host else f"port {job.port}"
    raise UserError(
        f"{given}: cannot be opened here, where the nodes or ranks meet ({error.strerror}); choose another by "
        f"--rendezvous {job.meeting_point.rpartition(':')[0] or '127.0.0.1'}:PORT"
    )


def check_gpus(job: Job) -> None:
    """No more ranks than GPUs, where there are GPUs; and there are, where the environment names some."""
    import torch

    gpus, ranks = torch.cuda.device_count(), job.ranks_per_node
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpus and re.match(r"\d|GPU-|MIG-", named):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES = {named}: torch {torch.__version__} finds no GPU; look at nvidia-smi and at the "
            "build of torch, or unset it to train on the CPU"
        )
    if gpus and ranks > gpus:
        given = f"--nproc-per-node {ranks}" if job.hostfile is None else f"--hostfile {job.hostfile}: slots={ranks}"
        raise UserError(f"{given}: this node has {gpus} GPUs; give {gpus} or fewer")


def is_head(job: Job) -> bool:
    """Whether the nodes, or DeepSpeed's ranks, will meet at a port of this machine."""
    if job.node_rank is not None:
        return job.node_rank == 0 and bool(job.host)
    if not job.host:
        return job.launcher == "deepspeed" and job.hostfile is None
    try:
        address = socket.getaddrinfo(job.host, 0, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return False
    return refusal(str(address), 0) is None


def make_logs(logs: Path) -> None:
    """Make the folder of the logs. Raises UserError where it cannot be written."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        if not os.access(logs, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"--logs {logs}: cannot be written ({error.strerror}); give another folder, or another run.folder, that "
            f"user {os.geteuid()} can write"
        ) from None


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


def _without(cfg: config.Config, section: str, keys: set[str]) -> Section:
    part: Section = getattr(cfg, section)
    return part.model_copy(update={key: type(part).model_fields[key].default for key in keys})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from its source folder"


def refusal(host: str, port: int) -> OSError | None:
    """Why nobody can listen at `port` of `host`; None: it is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _is_rendezvous(job: Job) -> bool:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            TCPStore(job.host, job.port, None, False, wait_for_workers=False)
            answered.set()

    # In a thread: torch waits without limit for the first answer of one who says nothing.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(ANSWER_SECONDS)
