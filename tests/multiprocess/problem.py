"""A small problem with everything that distributed training must get right, and its training on one real rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esam_dist import config
from esam_dist.data import Batch
from esam_dist.engine import MicroBatches, build_engine
from esam_dist.models import Classifier, compile_network
from esam_dist.models.freeze import freeze
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Engine, Moment, StepStats
from esam_dist.train import micro_batch

BATCH, CLASSES = 6, 5


class Network(nn.Module):
    """Convolutions, BatchNorm, dropout, a linear head; smooth, for at a kink the gradient jumps by a rounding error."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(images).mean(dim=(2, 3))))


def make_network(dtype: torch.dtype) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype).train()


def make_batch(rank: int, step: int, micro: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ranks hold data of unlike difficulty, so that they keep unequal numbers of samples."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator) * (1.0 + 2.0 * rank)
    return images.to(dtype), torch.randint(CLASSES, (BATCH,), generator=generator)


def rank_batch(ranks: Ranks, step: int, micro: int, dtype: torch.dtype, size: int) -> Batch:
    """The batch of one rank; a rank alone with a batch of 2 * BATCH holds what two ranks would."""
    parts = [make_batch(ranks.rank + part, step, micro, dtype) for part in range(size // BATCH)]
    return Batch(torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))


@dataclass
class Outcome:
    """What one rank has after training."""

    state: dict[str, Any]
    digest: str
    stats: list[StepStats]
    memory: dict[str, Any]


def scaler(scale: float, growth_interval: int = 2000) -> dict[str, Any]:
    """The state of a loss scaler that stands at `scale`, as engines save it."""
    factors = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": growth_interval}
    return {"scale": scale, **factors, "_growth_tracker": 0}


def at_scale(outcome: Outcome, scale: float) -> Outcome:
    """`outcome`, with another loss scale."""
    return replace(outcome, state=outcome.state | {"scaler": scaler(scale)})


def configuration(method: dict[str, Any], **sections: dict[str, Any]) -> config.Config:
    values: dict[str, Any] = {
        "data": {"batch_size": BATCH},
        "optim": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "decay_norm_and_bias": True},
        "method": method if method.get("name") == "sgd" else {"rho": 0.2, **method},
    }
    for section, entries in sections.items():
        values[section] = values.get(section, {}) | entries
    return config.parse(values, "test")


def engine_of(module: nn.Module, cfg: config.Config, ranks: Ranks) -> Engine:
    """The engine as the command line builds it."""
    batches = MicroBatches.of(cfg.data.batch_size, cfg.train, cfg.method)
    return build_engine(module, ranks, cfg.optim, cfg.engine, batches)


def train_rank(
    ranks: Ranks,
    cfg: config.Config,
    steps: int,
    dtype: torch.dtype,
    start: tuple[Outcome, int] | None = None,
    backend: str | None = None,
) -> Outcome:
    """Train `steps` updates on this rank as the loop does, from `start` (an outcome, and its step) or from scratch;
    with a `backend`, compiled as the command line does it.
    """
    classifier = Classifier(make_network(dtype), cfg.train.precision)
    freeze(classifier, cfg.model.freeze)
    if backend is not None:
        cfg.method.prepare(classifier)
        compile_network(classifier.network, by_block=cfg.method.stops_early, backend=backend)
    trainer = SharpnessAware.over(engine_of(classifier, cfg, ranks), cfg.method, ranks, seed=cfg.run.seed)
    stats: list[StepStats] = []
    first = 0
    if start is not None:
        outcome, first = start
        trainer.engine.load_state_dict(outcome.state)
        trainer.state.load_state_dict(outcome.memory)
    for step in range(first, first + steps):
        for micro in range(cfg.train.accumulate):
            batch = rank_batch(ranks, step, micro, dtype, cfg.data.batch_size)
            moment = Moment(step, float(step), step / cfg.train.epochs)
            stats.append(micro_batch(trainer, batch, cfg, moment, cfg.optim.lr))
    state = trainer.engine.state_dict()
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state["model"].values())).hexdigest()
    return Outcome(state, digest, stats, trainer.state.state_dict())
