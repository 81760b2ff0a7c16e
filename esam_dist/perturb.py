"""Which weights to perturb, by how much, and back again to the bit.

Equation numbers are those of the SAM paper (Foret et al. 2021, arXiv 2010.01412) and the ESAM paper (Du et al. 2022,
arXiv 2110.03141).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


def draw_tensors(module: nn.Module, beta: float, generator: torch.Generator) -> list[nn.Parameter]:
    """SWP: each trainable tensor with probability `beta` (ESAM section 3.2), and never none at all."""
    trainable = [param for param in module.parameters() if param.requires_grad]
    if beta >= 1.0:
        return trainable
    lots = torch.rand(len(trainable), generator=generator)
    drawn = [param for param, lot in zip(trainable, lots.tolist(), strict=True) if lot < beta]
    return drawn or [trainable[int(lots.argmin())]]


def radius(rho: float, beta: float, scale: str) -> float:
    """The norm of the perturbation when a share `beta` of the weights is perturbed.

    `none`: rho, whatever beta. `paper`: rho / sqrt(beta), the expected norm under ESAM equation 7, which divides the
    kept components by beta. `released`: rho / beta, as the authors' code has it.
    """
    return rho / {"none": 1.0, "paper": math.sqrt(beta), "released": beta}[scale]


class Perturbation(NamedTuple):
    """A direction over some parameters, ready to be added: `scale * directions` has the wanted norm.

    `scale` is a scalar on the device: radius over norm, or 0 where the norm is 0 or not finite.
    """

    params: list[nn.Parameter]
    directions: list[Tensor]
    scale: Tensor
    finite: Tensor


def ascent(params: list[nn.Parameter], grads: list[Tensor], norm: float) -> Perturbation:
    """The first-order worst direction within the ball of radius `norm`: `norm * g / ||g||` (SAM equation 2).

    `grads` is consumed: `perturbed` keeps the weights in its memory.
    """
    grad_norm = torch.nn.utils.get_total_norm(grads)
    finite = torch.isfinite(grad_norm)
    scale = torch.where(finite & (grad_norm > 0), norm / grad_norm, torch.zeros_like(grad_norm))
    # 0 * nan is nan: a gradient that is not finite must be cleared, not scaled, or it would reach the weights.
    for grad in grads:
        grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return Perturbation(params, grads, scale, finite)


@contextmanager
def perturbed(perturbation: Perturbation) -> Iterator[None]:
    """Add the perturbation in place; on leaving, also by an exception, restore the weights to the bit.

    No memory stays allocated: inside the block the directions' own memory holds the unperturbed weights. The storage
    of the parameters never changes, so DDP's buckets, DeepSpeed's flat buffers and CUDA graphs stay valid.
    """
    params, directions, scale, _ = perturbation
    weights = [param.detach() for param in params]
    moved = torch._foreach_mul(directions, scale)
    torch._foreach_add_(moved, weights)
    torch._foreach_copy_(directions, weights)
    torch._foreach_copy_(weights, moved)
    del moved
    try:
        yield
    finally:
        torch._foreach_copy_(weights, directions)


@contextmanager
def frozen_batchnorm(module: nn.Module) -> Iterator[None]:
    """Forward passes inside the block leave BatchNorm's running statistics alone, and still normalise by the batch.

    They must move once a step, at the unperturbed weights. Detaching the statistics is exact even for a batch that
    is not finite, where a momentum of 0 would multiply 0 by nan.
    """
    norms = [
        child
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training and child.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
