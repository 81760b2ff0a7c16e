"""From a gradient to a perturbation of the weights, and back again to the bit.

Equation numbers are those of the SAM paper (Foret et al. 2021, arXiv 2010.01412).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Perturbation(NamedTuple):
    """A direction over some parameters: `scale * directions` is what is added to them."""

    params: list[nn.Parameter]
    directions: list[Tensor]
    scale: Tensor
    """Scalar on the device; 0 where the direction's norm is 0 or not finite."""
    finite: Tensor
    """Scalar bool on the device: whether the direction could be used."""


def radius(rho: float, beta: float, scale: str) -> float:
    """The norm of the perturbation when a share `beta` of the weights is perturbed.

    `none`: rho, whatever beta is. `paper`: rho / sqrt(beta), the expected norm under the ESAM paper's equation 7,
    which divides the kept components by beta. `released`: rho / beta, as in the authors' code.
    """
    return rho / {"none": 1.0, "paper": math.sqrt(beta), "released": beta}[scale]


def none(device: torch.device) -> Perturbation:
    """No perturbation, for a pass in which none of the drawn weights took part."""
    return Perturbation([], [], torch.zeros((), device=device), torch.ones((), dtype=torch.bool, device=device))


def owned(grads: Sequence[Tensor]) -> list[Tensor]:
    """`grads`, each in memory of its own, so that it can be written to.

    Autograd may share memory: weights that are added get one tensor, weights that are summed get one expanded number.
    """
    taken: set[int] = set()
    own = []
    for grad in grads:
        shares = grad.data_ptr() in taken or 0 in grad.stride()
        own.append(grad.clone(memory_format=torch.contiguous_format) if shares else grad)
        taken.add(grad.data_ptr())
    return own


def along(params: list[nn.Parameter], directions: list[Tensor], norm: float) -> Perturbation:
    """`norm * d / ||d||` (SAM equation 2, for d the gradient). `directions` is overwritten: nan in it becomes 0."""
    return _scaled(params, directions, norm, torch.nn.utils.get_total_norm(directions))


def along_adaptive(params: list[nn.Parameter], grads: list[Tensor], norm: float, eta: float) -> Perturbation:
    """ASAM (Kwon et al. 2021, arXiv 2102.11600, equation 7): `norm * T^2 g / ||T g||` with `T = |w| + eta`.

    The ball is measured in units of each weight's own size, so it does not change when a layer is rescaled.
    `grads` is overwritten.
    """
    sizes = torch._foreach_abs([param.detach() for param in params])
    torch._foreach_add_(sizes, eta)
    torch._foreach_mul_(grads, sizes)
    normaliser = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, sizes)
    return _scaled(params, grads, norm, normaliser)


def _scaled(params: list[nn.Parameter], directions: list[Tensor], norm: float, normaliser: Tensor) -> Perturbation:
    finite = torch.isfinite(normaliser)
    scale = torch.where(finite & (normaliser > 0), norm / normaliser, torch.zeros_like(normaliser))
    clear(directions)
    return Perturbation(params, directions, scale, finite)


def clear(grads: list[Tensor]) -> None:
    """Set what is not finite to 0, in place. A factor of 0 could not keep it from the weights: 0 * nan is nan."""
    for grad in grads:
        grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@contextmanager
def perturbed(perturbation: Perturbation, *, keep_directions: bool = False) -> Iterator[None]:
    """Add the perturbation in place. On leaving, also by an exception, restore the weights to the bit.

    Unless `keep_directions` is set, the directions' own memory holds the unperturbed weights meanwhile, so nothing
    besides the gradient stays allocated. The storage of the parameters never changes: DDP's buckets, DeepSpeed's
    flat buffers and CUDA graphs stay valid.
    """
    params, directions, scale, _ = perturbation
    if not params:
        yield
        return
    weights = [param.detach() for param in params]
    moved = list(torch._foreach_mul(directions, scale))
    torch._foreach_add_(moved, weights)
    backup = [weight.clone() for weight in weights] if keep_directions else directions
    if not keep_directions:
        torch._foreach_copy_(backup, weights)
    torch._foreach_copy_(weights, moved)
    del moved
    try:
        yield
    finally:
        torch._foreach_copy_(weights, backup)
