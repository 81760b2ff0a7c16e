"""The sections of a configuration, each from the code that reads its keys."""

from __future__ import annotations

from esam_dist.checkpoint.keys import CheckpointKeys
from esam_dist.data.keys import DataKeys
from esam_dist.engine.keys import EngineKeys, OptimKeys
from esam_dist.methods import ESAM, AnyMethod
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.models.keys import ModelKeys
from esam_dist.run_keys import RunKeys
from esam_dist.section import Section
from esam_dist.train_keys import TrainKeys


class Config(Section):
    """One training run."""

    run: RunKeys = RunKeys()
    model: ModelKeys = ModelKeys()
    data: DataKeys = DataKeys()
    train: TrainKeys = TrainKeys()
    optim: OptimKeys = OptimKeys()
    method: AnyMethod = ESAM()
    engine: EngineKeys = EngineKeys()
    checkpoint: CheckpointKeys = CheckpointKeys()
    metrics: MetricsKeys = MetricsKeys()
