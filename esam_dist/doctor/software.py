"""Versions, GPUs and NCCL."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from esam_dist import config
from esam_dist.doctor.row import Row, fail, ok, warn

OURS = "esam-dist"
PACKAGES = ("torch", "torchvision", "deepspeed")
DRIVER = Path("/proc/driver/nvidia/version")


def versions(cfg: config.Config, requires: Iterable[str] | None = None) -> list[Row]:
    """Python, ours, and the packages that a run stands on, each against what ours `requires`."""
    needed = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, _requires() if requires is None else requires)
    }
    rows = [ok("python", platform.python_version()), ok(OURS, _version(OURS) or "from its source folder")]
    for name in PACKAGES:
        found, wanted = _version(name), needed.get(name)
        remedy = f"pip install '{name}{wanted or ''}'"
        if found is None and name == "deepspeed" and cfg.engine.name != "deepspeed":
            rows.append(warn(name, "not installed", f"{remedy}, if you mean to use engine.name = deepspeed"))
        elif found is None:
            rows.append(fail(name, "not installed", remedy))
        elif wanted is not None and not wanted.contains(Version(found).public, prereleases=True):
            rows.append(fail(name, f"{found}, where {wanted} is needed", remedy))
        else:
            rows.append(ok(name, found))
    return rows


def devices() -> list[Row]:
    """Every GPU computes, and none is there that torch does not see."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count:
        return [_gpu(number) for number in range(count)]
    if named == "":
        return [warn("devices", "no GPU: CUDA_VISIBLE_DEVICES is empty", "unset it to train on GPUs")]
    build = (
        f"torch {torch.__version__} is built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'for CPUs'}"
    )
    if DRIVER.exists() or named:
        why = "there is a driver" if DRIVER.exists() else f"CUDA_VISIBLE_DEVICES = {named}"
        remedy = "install a build of torch for the driver's CUDA (nvidia-smi names it); see pytorch.org/get-started"
        return [fail("devices", f"no GPU found, though {why}; {build}", remedy)]
    return [ok("devices", f"no GPU, {os.cpu_count()} CPU cores")]


def nccl() -> list[Row]:
    """What GPUs speak with each other by."""
    if not torch.cuda.device_count():
        return [ok("NCCL", "not needed without GPUs")]
    if not torch.distributed.is_nccl_available():
        return [fail("NCCL", "this build of torch has none", "install torch's CUDA build for Linux")]
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch gives it no types
    return [ok("NCCL", ".".join(map(str, version)))]


def _gpu(number: int) -> Row:
    name = f"GPU {number}"
    properties = torch.cuda.get_device_properties(number)
    told = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    try:
        ones = torch.ones(64, 64, device=f"cuda:{number}")
        computes = bool((ones @ ones == 64).all())
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        first = str(error).partition("\n")[0][:100]
        return fail(name, f"{told}: {first}", "use a build of torch for it, or leave it out by CUDA_VISIBLE_DEVICES")
    if not computes:
        return fail(name, f"{told}: computes wrongly", "leave it out by CUDA_VISIBLE_DEVICES, and have it looked at")
    if free < 0.8 * total:
        used = (total - free) / 2**30
        return warn(name, f"{told}, of which {used:.0f} GiB are in use", "nvidia-smi names the processes; end them")
    return ok(name, told)


def _requires() -> list[str]:
    try:
        return metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
