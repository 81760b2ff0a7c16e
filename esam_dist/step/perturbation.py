"""From a direction to a perturbation of the weights, which is undone to the bit.

Equation numbers are those of the SAM paper (Foret et al. 2021, arXiv 2010.01412).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from esam_dist.step.vector import Vector


class Perturbation(NamedTuple):
    """`scale * direction` is what is added to the weights."""

    direction: Vector
    scale: Tensor
    """Scalar on the device; 0 where the direction's norm is 0 or not finite."""
    finite: Tensor
    """Scalar bool on the device: whether the direction could be used."""


def radius(rho: float, beta: float, scale: str) -> float:
    """The norm of the perturbation when a share `beta` of the weights is perturbed.

    `none`: rho, whatever beta. `paper`: rho / sqrt(beta), the expected norm under the ESAM paper's equation 7, which
    divides the kept components by beta. `released`: rho / beta, as the authors' code has it.
    """
    return rho / {"none": 1.0, "paper": math.sqrt(beta), "released": beta}[scale]


def along(direction: Vector, radius: float, norm: Tensor | None = None) -> Perturbation:
    """`radius * d / ||d||` (SAM equation 2, for d the gradient), or `radius * d / norm`.

    `direction` is taken over, and cleared of what is not finite.
    """
    norm = direction.norm() if norm is None else norm
    finite = torch.isfinite(norm)
    scale = torch.where(finite & (norm > 0), radius / norm, torch.zeros_like(norm))
    return Perturbation(direction.clear_(), scale, finite)


@contextmanager
def perturbed(weights: list[Tensor], perturbation: Perturbation, *, keep: bool = False) -> Iterator[None]:
    """Add the perturbation to `weights` in place; on leaving, also by an exception, restore them to the bit.

    With `keep` the direction stays as it is. Otherwise its memory holds the unperturbed weights meanwhile, so that
    nothing more stays allocated. The storage of the weights never changes: DDP's buckets, DeepSpeed's flat buffers and
    CUDA graphs stay valid.
    """
    if not weights:
        yield
        return
    directions = perturbation.direction.tensors
    moved = list(torch._foreach_mul(directions, perturbation.scale))
    torch._foreach_add_(moved, weights)
    backup = [weight.clone() for weight in weights] if keep else directions
    if not keep:
        torch._foreach_copy_(backup, weights)
    torch._foreach_copy_(weights, moved)
    del moved
    try:
        yield
    finally:
        torch._foreach_copy_(weights, backup)
