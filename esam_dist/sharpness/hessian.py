"""The Hessian of the loss, which is only ever multiplied by vectors: its largest eigenvalues, and its trace."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from esam_dist.errors import UserError
from esam_dist.sharpness.objective import Direction, Objective


class Estimate(NamedTuple):
    """The mean of random draws, and its standard error."""

    mean: float
    error: float

    @staticmethod
    def of(draws: list[float]) -> Estimate:
        """From at least two draws."""
        mean = sum(draws) / len(draws)
        spread = sum((draw - mean) ** 2 for draw in draws) / (len(draws) - 1)
        return Estimate(mean, math.sqrt(spread / len(draws)))


def largest_eigenvalues(objective: Objective, count: int, *, tolerance: float = 1e-3, seed: int = 0) -> list[float]:
    """The `count` algebraically largest eigenvalues, falling, to the relative `tolerance`: Lanczos, as ARPACK has it.

    All ranks run it alike, for each product is the same on all of them. Raises UserError where it does not converge.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    like = objective.params[0]

    def product(vector: Any) -> Any:
        part = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(like)
        return _flat(objective.product(_shaped(part, objective))).cpu().numpy()

    kind = np.float64 if like.dtype == torch.float64 else np.float32
    operator = LinearOperator((objective.size, objective.size), matvec=product, dtype=kind)
    start = np.random.default_rng(seed).standard_normal(objective.size).astype(kind)
    wanted = min(count, objective.size - 1)
    try:
        values = eigsh(operator, k=wanted, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise UserError(
            f"--eigenvalues {count}: only {len(error.eigenvalues)} converged to --tolerance {tolerance:g}; ask for "
            "fewer, or allow a larger tolerance"
        ) from None
    return sorted(map(float, values), reverse=True)


def trace(objective: Objective, probes: int, *, seed: int = 0) -> Estimate:
    """The sum of all eigenvalues, by Hutchinson's estimator: the mean of v'Hv over `probes` vectors of random signs."""
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(probes):
        signs = [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in objective.params]
        products = objective.product(signs)
        draws.append(sum(float((v * h).double().sum()) for v, h in zip(signs, products, strict=True)))
    return Estimate.of(draws)


def _flat(direction: Direction) -> Tensor:
    return parameters_to_vector(part.contiguous() for part in direction)


def _shaped(vector: Tensor, objective: Objective) -> Direction:
    parts = torch.split(vector, [param.numel() for param in objective.params])
    return [part.view(param.shape) for part, param in zip(parts, objective.params, strict=True)]
