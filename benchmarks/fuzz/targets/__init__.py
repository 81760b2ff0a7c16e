"""What is fuzzed, by name. Each target is made with a folder of its own, and needs no fuzzer: tests try it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.fuzz.targets.checkpoint import CheckpointTarget
from benchmarks.fuzz.targets.config import ConfigTarget
from benchmarks.fuzz.targets.dataset import DatasetTarget
from benchmarks.fuzz.targets.jpeg import JpegTarget
from benchmarks.fuzz.targets.stream import StreamTarget
from benchmarks.fuzz.targets.tar import TarTarget
from benchmarks.fuzz.targets.target import Target, attempt

TARGETS: dict[str, Callable[[Path], Target]] = {
    "config": ConfigTarget,
    "dataset": DatasetTarget,
    "tar": TarTarget,
    "jpeg": JpegTarget,
    "checkpoint": CheckpointTarget,
    "stream": StreamTarget,
}

__all__ = ["TARGETS", "Target", "attempt"]
