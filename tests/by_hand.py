"""SAM as anyone would write it, in two forward-backward passes with the weights restored: nothing of the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
FEATURES, CLASSES, RHO = 6, 3, 0.1


def network(*, dtype: torch.dtype = torch.float64, batchnorm: bool = False, dropout: float = 0.0) -> nn.Module:
    """Smooth, for at a kink the gradient jumps by a rounding error."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(8)] if batchnorm else []
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(FEATURES, 8), *norm, nn.Tanh(), *drop, nn.Linear(8, CLASSES)).to(dtype)


def batch(step: int, micro: int = 0, rank: int = 0, *, size: int = 8, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return (
        torch.randn(size, FEATURES, generator=generator, dtype=torch.float64).to(dtype) * (1.0 + rank),
        torch.randint(CLASSES, (size,), generator=generator),
    )


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[Batch], *, rho: float = RHO, clip: float = 0.0
) -> None:
    """One update from `parts`, each with a perturbation of its own: micro-batches, ranks, or groups."""
    params = list(model.parameters())
    total = [torch.zeros_like(param) for param in params]
    for inputs, labels in parts:
        model.zero_grad()
        losses(model(inputs), labels).mean().backward()
        norm = torch.cat([param.grad.flatten() for param in params]).norm()
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param in params:
                param.add_(rho * param.grad / norm)
        model.zero_grad()
        losses(model(inputs), labels).mean().backward()
        with torch.no_grad():
            for param, weight, mean in zip(params, before, total, strict=True):
                mean.add_(param.grad / len(parts))
                param.copy_(weight)
    for param, mean in zip(params, total, strict=True):
        param.grad = mean
    if clip:
        nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])
