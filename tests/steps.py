"""One step in one process, and what it did on the way: what every pass saw, and what the weights were when it ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine, UpdateOptions
from esam_dist.losses import CrossEntropy
from esam_dist.methods import METHODS, SGD, Method
from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment, StepStats

LR, RADIUS = 0.1, 0.3
PLAIN = SGD()
WHOLE: dict[str, dict[str, Any]] = {
    "esam": {"beta": 1.0, "gamma": 1.0, "scope": "rank"},
    "recycled": {"gamma": 1.0, "scope": "rank"},
}


def sharp(name: str = "esam", **keys: Any) -> Method:
    """A method that climbs by `RADIUS`, with all weights and for all samples where `keys` do not say otherwise."""
    return METHODS[name](**({"rho": RADIUS} | WHOLE.get(name, {}) | keys))


def digits_batch(size: int = 12, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 8, 8, generator=generator).to(dtype)
    return Batch(images, torch.randint(10, (size,), generator=generator))


class Passes(nn.Module):
    """A network that notes, whenever a forward pass begins, its images and its weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images: list[Tensor] = []
        self.weights: list[list[Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.images.append(images.detach().clone())
        self.weights.append(weights(self.network))
        return self.network(images)


class NotedEngine(NativeEngine):
    """An engine that notes weights and gradients when a micro-batch ends, before the weights move."""

    at_update: list[list[Tensor]]
    grads: list[list[Tensor | None]]

    def step(self, lr: float | None) -> Tensor:
        params = list(self.module.parameters())
        self.at_update.append(weights(self.module))
        self.grads.append([None if param.grad is None else param.grad.clone() for param in params])
        return super().step(lr)


class Trial:
    """Training of one network in one process, by any method in every step."""

    def __init__(
        self,
        network: nn.Module,
        momentum: float = 0.0,
        accumulate: int = 1,
        seed: int = 0,
        lr: float = LR,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.passes = Passes(network)
        self.module = Classifier(self.passes).train()
        trainable = [param for param in self.module.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr, momentum=momentum)
        self.engine = NotedEngine(self.module, optimizer, Ranks(), UpdateOptions(accumulate, scaler=scaler))
        self.at_update = self.engine.at_update = []
        self.grads = self.engine.grads = []
        self.trainer = SharpnessAware.over(self.engine, PLAIN, Ranks(), seed=seed)

    def train(self, batch: Batch, method: Method, moment: Moment | None = None) -> StepStats:
        """One micro-batch, by `method`; at another `moment` than that of the updates so far."""
        self.trainer.method = method
        return self.trainer.step(batch.images, batch.labels, CrossEntropy(0.0), moment=moment)


def step(network: nn.Module, batch: Batch, method: Method, seed: int = 0) -> StepStats:
    """One step of SGD without momentum."""
    return Trial(network, seed=seed).train(batch, method)


def weights(module: nn.Module) -> list[Tensor]:
    """Copies, each parameter once."""
    return [param.detach().clone() for param in module.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all are equal to the bit, nan too."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )
