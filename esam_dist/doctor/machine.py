"""Shared memory, disk, ports, data, and how fast images are decoded."""

from __future__ import annotations

import errno
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from esam_dist import config
from esam_dist.data.decode import Box, ImageFile
from esam_dist.data.raw import ring_bytes
from esam_dist.doctor.row import Row, fail, ok, warn
from esam_dist.errors import UserError
from esam_dist.launch.arguments import PORT
from esam_dist.launch.checks import check_data, refusal
from esam_dist.models import build_model

SHARED = Path("/dev/shm")
METRICS_PORT = 9400
"""Looked at where the configuration has no `metrics.port`: what the examples use."""
MIB, GIB = 2**20, 2**30
DECODE_SECONDS = 1.0
SLOW = 100.0
"""Images a second and core below which something else takes the cores."""
WIDTH, HEIGHT, CROP = 500, 375, 224


def ranks() -> int:
    """Ranks that this machine would have."""
    return torch.cuda.device_count() or 1


def shared_memory(cfg: config.Config, folder: Path = SHARED) -> list[Row]:
    """What the loaders of all ranks need, for training and validation, against what is free."""
    need = 2 * ranks() * ring_bytes(cfg.data, cfg.data.workers)
    if not folder.is_dir():
        remedy = "mount a tmpfs there (docker run --shm-size 1g), or set data.workers = 0"
        return [fail("shared memory", f"{folder} is not there", remedy)]
    disk = shutil.disk_usage(folder)
    found = f"{folder}: {disk.free / MIB:,.0f} of {disk.total / MIB:,.0f} MiB free, loaders need {need / MIB:,.0f}"
    remedy = "give more (docker run --shm-size 1g; an emptyDir with medium: Memory), or lower data.workers"
    if disk.free < need:
        return [fail("shared memory", found, remedy)]
    return [warn("shared memory", found, remedy) if disk.free < 2 * need else ok("shared memory", found)]


def disk(cfg: config.Config) -> list[Row]:
    """Room for the checkpoints of a run, where its folder is or will be."""
    folder = cfg.run.folder.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        found = f"{folder}: cannot be written by user {os.geteuid()}"
        return [fail("disk", found, "choose another run.folder, or let this user write there")]
    free, need = shutil.disk_usage(folder).free, (cfg.checkpoint.keep + 2) * _checkpoint_bytes(cfg)
    found = f"{folder}: {free / GIB:,.1f} GiB free, checkpoints need {need / GIB:,.2f}"
    remedy = "make room, choose another run.folder, or lower checkpoint.keep"
    if free < need:
        return [fail("disk", found, remedy)]
    return [warn("disk", found, remedy) if free < 3 * need or free < GIB else ok("disk", found)]


def ports(cfg: config.Config, rendezvous: int = PORT) -> list[Row]:
    """Nobody listens where ranks meet and where Prometheus asks."""
    given = bool(cfg.metrics.port)
    first = cfg.metrics.port or METRICS_PORT
    taken = [f"{port} ({refused})" for port in range(first, first + ranks()) if (refused := _refused(cfg, port))]
    wanted = f"{first}" if ranks() == 1 else f"{first} to {first + ranks() - 1}"
    rows = [ok("metrics port", f"{wanted} free")]
    if taken:
        state = fail if given else warn
        rows = [state("metrics port", ", ".join(taken), "end who listens there (ss -ltnp), or choose another port")]
    error = refusal("", rendezvous)
    if error is None:
        return [*rows, ok("rendezvous port", f"{rendezvous} free")]
    remedy = "wait for the other job, or give `esam-dist launch --rendezvous HOST:PORT` another port"
    return [*rows, warn("rendezvous port", f"{rendezvous} ({error.strerror})", remedy)]


def data(cfg: config.Config) -> list[Row]:
    """The data that the configuration names is there."""
    try:
        check_data(cfg)
    except UserError as error:
        found, _, remedy = str(error).rpartition("; ")
        return [fail("data", found, remedy)]
    return [ok("data", str(cfg.data.path))]


def decoding(seconds: float = DECODE_SECONDS) -> list[Row]:
    """Crops of a JPEG of the size of a photograph in ImageNet, on one core."""
    image, done = _jpeg(), 0
    out = np.empty((CROP, CROP, 3), np.uint8)
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        ImageFile(image).crop(Box(60, 20, 350, 320), out)
        done += 1
    rate, cores = done / (time.perf_counter() - start), os.cpu_count() or 1
    found = f"{rate:,.0f} images a second and core ({WIDTH} x {HEIGHT} to {CROP}), {cores} cores"
    if rate < SLOW:
        remedy = "see who else uses the cores (top), and the container's CPU limit; or prepare with --short-side 256"
        return [warn("decoding", found, remedy)]
    return [ok("decoding", found)]


def _jpeg() -> bytes:
    """A picture with as much detail as a photograph, always the same."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _refused(cfg: config.Config, port: int) -> str:
    error = refusal(cfg.metrics.bind, port)
    if error is None:
        return ""
    return "taken" if error.errno == errno.EADDRINUSE else str(error.strerror)


def _checkpoint_bytes(cfg: config.Config) -> int:
    """Weights and the optimizer's one or two vectors, in float32, with 1000 classes where nothing is said."""
    with torch.device("meta"):
        network = build_model(cfg.model.name, cfg.model.num_classes or 1000)
    copies = 3 if cfg.optim.name == "adamw" else 2
    return 4 * copies * sum(param.numel() for param in network.parameters())
