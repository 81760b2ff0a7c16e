"""One step in one process, and what it did on the way: what every pass saw, and what the weights were when it ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, StepStats
from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule
from esam_dist.train import micro_batch

LR = 0.1


def sam_rule(**changes: Any) -> Rule:
    return Rule(**({"name": "esam", "rho": 0.3, "radius": 0.3} | changes))


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


class Trial(NativeEngine):
    """An engine on one network, with its optimizer, that notes weights and gradients when an update begins."""

    def __init__(self, network: nn.Module, momentum: float = 0.0, accumulate: int = 1) -> None:
        self.passes = Passes(network)
        module = Classifier(self.passes).train()
        trainable = [param for param in module.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(trainable, LR, momentum=momentum)
        super().__init__(module, optimizer, Ranks(), accumulate=accumulate)
        self.memory = Memory()
        self.at_update: list[list[Tensor]] = []
        self.grads: list[list[Tensor | None]] = []

    def step(self, lr: float) -> Tensor:
        params = list(self.module.parameters())
        self.at_update.append(weights(self.module))
        self.grads.append([None if param.grad is None else param.grad.clone() for param in params])
        return super().step(lr)

    def train(self, batch: Batch, rule: Rule, seed: tuple[int, ...] = (0,), group_size: int = 0) -> StepStats:
        """One micro-batch, as the loop would make it; the statistics are its last group's."""
        ranks, clock = Ranks(), PhaseClock(torch.device("cpu"))
        return [
            *micro_batch(self, batch, rule, group_size, lr=LR, ranks=ranks, seed=seed, clock=clock, memory=self.memory)
        ][-1]


def step(network: nn.Module, batch: Batch, rule: Rule, seed: tuple[int, ...] = (0,)) -> StepStats:
    """One step of SGD without momentum."""
    return Trial(network).train(batch, rule, seed)


def weights(module: nn.Module) -> list[Tensor]:
    """Copies, each parameter once."""
    return [param.detach().clone() for param in module.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all are equal to the bit, nan too."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )
