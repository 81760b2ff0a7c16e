"""The parts of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esam_dist import config
from esam_dist.averaging import WeightAverage
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import TrainData, ValidationData
from esam_dist.metrics import Metrics
from esam_dist.progress import Progress
from esam_dist.sharpness_aware import SharpnessAware


@dataclass
class Training:
    """The parts of a run, put together by `cli`."""

    cfg: config.Config
    trainer: SharpnessAware
    data: TrainData
    validation: ValidationData
    metrics: Metrics
    checkpoints: Checkpoints
    progress: Progress
    stop_requested: Callable[[], bool]
    average: WeightAverage | None = None
    """Of the weights, validated beside them."""
    has_begun: Callable[[], None] = lambda: None
    """Called when all ranks have made an update: before, a stop has nothing to save, and is none of the loop's."""
