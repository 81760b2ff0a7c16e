"""What must hold when a job is over: the weights, the samples, and that nothing is left."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.chaos import history
from benchmarks.chaos.configurations import BATCH, TRAIN, Configuration
from benchmarks.chaos.place import Place
from benchmarks.processes import of_job
from esam_dist.checkpoint import read

LEFT_SECONDS = 30.0
"""Processes that end by themselves have so long for it."""


class Digests(NamedTuple):
    """Of the last checkpoint: SHA-256 of the weights alone, and of the whole state."""

    weights: str
    state: str


def digests(checkpoint: Path) -> Digests:
    """The digests of a checkpoint's content; where it was written, and when, does not count."""
    state = read(checkpoint)
    return Digests(_digest(state["engine"]["model"]), _digest(state))


def check(place: Place, configuration: Configuration, steps: int, mark: str, expected: Digests | None) -> list[str]:
    """What is wrong with a job that came to its end: nothing, if all is well."""
    wrong = [f"still there after {LEFT_SECONDS:.0f} s: {left}" for left in _processes(mark)]
    last = place.run / f"checkpoints/step_{steps:08d}"
    try:
        found = digests(last)
    except Exception as error:  # whatever it is, it is a finding
        return [*wrong, f"no last checkpoint: {error}"]
    if expected is not None and found.weights != expected.weights:
        wrong.append(f"weights differ: {found.weights[:12]}, undisturbed {expected.weights[:12]}")
    elif expected is not None and found.state != expected.state:
        wrong.append(f"weights are equal, other state differs: {found.state[:12]}, undisturbed {expected.state[:12]}")
    wrong += history.faults(place.control, configuration.ranks, BATCH, steps, TRAIN)
    wrong += [f"left in /dev/shm: {name}" for name in place.left_in_shared_memory()]
    remains = [*place.run.rglob(".*partial*"), *place.run.rglob(".replaced*"), *place.run.glob("run.lock")]
    return wrong + [f"left in the run folder: {path.relative_to(place.run)}" for path in remains]


def _processes(mark: str) -> list[str]:
    end = time.monotonic() + LEFT_SECONDS
    while (left := of_job(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    return [f"{process.role} {process.rank} (process {process.pid})" for process in left]


def _digest(value: Any) -> str:
    hashed = hashlib.sha256()
    _add(hashed, value)
    return hashed.hexdigest()


def _add(hashed: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            hashed.update(f"{key}:".encode())
            _add(hashed, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(hashed, item)
    elif isinstance(value, torch.Tensor):
        hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hashed.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        hashed.update(repr(value).encode())
