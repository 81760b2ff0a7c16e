"""The gradient that the update uses, where it is more than the gradient at the perturbed weights.

Everything here is local to a rank; the result is handed to the engine as an `Injection`, which averages it over ranks
in the same all-reduce as any other gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Injection(torch.autograd.Function):
    """A scalar of value 0 whose gradient with respect to `params` is given: no arithmetic, one all-reduce.

    `Injection.apply(grads, *params)`; a term of a loss like any other.
    """

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *params: Tensor) -> Tensor:
        """The value 0."""
        ctx.grads = grads
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The given gradients, times the gradient of what the scalar became part of."""
        return (None, *torch._foreach_mul(list(ctx.grads), outer[0]))


def inject(params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> Tensor:
    """A term of the loss that adds `grads` to the gradients of `params`."""
    term: Tensor = Injection.apply(grads, *params)
    return term


def surrogate_gap(clean: list[Tensor], sharp: list[Tensor], alpha: float) -> list[Tensor]:
    """GSAM (Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1): minimise the perturbed loss and the gap to the loss.

    The part of the clean gradient that is orthogonal to the perturbed one, `g - (g . g_p / ||g_p||^2) g_p`, is
    subtracted `alpha` times from the perturbed gradient.
    """
    share = _dot(clean, sharp) / _dot(sharp, sharp).clamp_min(1e-30)
    orthogonal = torch._foreach_sub(clean, list(torch._foreach_mul(sharp, share)))
    return list(torch._foreach_sub(sharp, list(torch._foreach_mul(list(orthogonal), alpha))))


def flat_part(clean: list[Tensor], sharp: list[Tensor]) -> list[Tensor]:
    """LookSAM (Liu et al. 2022, arXiv 2203.02714, equation 5): the part of the perturbed gradient that is orthogonal
    to the clean one. It points to flat regions, and changes slowly enough to be used again.
    """
    share = _dot(clean, sharp) / _dot(clean, clean).clamp_min(1e-30)
    return list(torch._foreach_sub(sharp, list(torch._foreach_mul(clean, share))))


def with_flat_part(clean: list[Tensor], flat: list[Tensor], alpha: float) -> list[Tensor]:
    """LookSAM (Algorithm 1), between two perturbations: `g + alpha * ||g|| / ||g_v|| * g_v`."""
    ratio = _dot(clean, clean).sqrt() / _dot(flat, flat).sqrt().clamp_min(1e-30)
    return list(torch._foreach_add(clean, list(torch._foreach_mul(flat, alpha * ratio))))


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([product.sum() for product in torch._foreach_mul(left, right)]).sum()
