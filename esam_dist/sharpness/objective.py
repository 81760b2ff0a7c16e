"""The mean loss over samples of all ranks, as a function of the weights.

Letters: B samples, K classes. A direction is a list of tensors, one for each trainable parameter and of its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from esam_dist.data import Batch
from esam_dist.ranks import Ranks

Direction = list[Tensor]


class Objective:
    """Cross-entropy of `module` on `batches`, this rank's share of the samples: the mean over those of all ranks.

    The module is in evaluation mode while the objective is used: BatchNorm keeps its running statistics and nothing is
    dropped, so that the loss is a function of the weights and of nothing else. Every method is called by all ranks
    together, and gives all of them the same.
    """

    def __init__(self, module: nn.Module, batches: Sequence[Batch], ranks: Ranks) -> None:
        self.module, self.batches, self.ranks = module.eval(), batches, ranks
        self.params: list[Tensor] = [param for param in module.parameters() if param.requires_grad]
        here = sum(len(batch.labels) for batch in batches)
        self.num_samples = int(self._sum(torch.tensor(float(here), dtype=torch.float64)))
        self.size = sum(param.numel() for param in self.params)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss at the present weights."""
        return self._sum(torch.stack([self.losses(batch).double().sum().cpu() for batch in self.batches]).sum())

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, [B]."""
        return F.cross_entropy(self.module(batch.images), batch.labels, reduction="none")

    def gradient(self) -> Direction:
        """The gradient of the mean loss."""
        return self._total(torch.autograd.grad(self._share(batch), self.params) for batch in self.batches)

    def product(self, direction: Direction) -> Direction:
        """The Hessian of the mean loss times `direction`: the gradient of the slope along it (Pearlmutter 1994)."""
        return self._total(self._product(batch, direction) for batch in self.batches)

    def _product(self, batch: Batch, direction: Direction) -> tuple[Tensor, ...]:
        # The fused attention kernels know no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            slopes = torch.autograd.grad(self._share(batch), self.params, create_graph=True)
            along = sum((slope * part).sum() for slope, part in zip(slopes, direction, strict=True))
            # A parameter in which the loss is linear has no curvature of its own.
            return torch.autograd.grad(along, self.params, materialize_grads=True)  # type: ignore[arg-type]

    @contextmanager
    def at(self, direction: Direction, factor: float = 1.0) -> Iterator[None]:
        """The weights moved by `factor * direction` within the block; behind it they are what they were, to the bit."""
        kept = [param.detach().clone() for param in self.params]
        with torch.no_grad():
            torch._foreach_add_(self.params, direction, alpha=factor)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, kept)

    def _share(self, batch: Batch) -> Tensor:
        return self.losses(batch).sum() / self.num_samples

    def _sum(self, number: Tensor) -> float:
        """The sum over ranks of a number on the CPU."""
        return float(self.ranks.sum_(number.double().to(self.ranks.device)))

    def _total(self, parts: Iterator[tuple[Tensor, ...]]) -> Direction:
        total = [torch.zeros_like(param) for param in self.params]
        for part in parts:
            torch._foreach_add_(total, list(part))
        return [self.ranks.sum_(tensor) for tensor in total]


def norm(direction: Direction) -> float:
    """The Euclidean norm over all tensors."""
    return float(torch.stack([part.double().square().sum() for part in direction]).sum().sqrt())
