"""How much the loss rises within a distance rho of the weights: at worst, by SAM's own estimate, and on average.

m-sharpness (Foret et al. 2021, section 4.1) perturbs for m samples at a time, each group along its own gradient. What a
rank of SAM perturbs for in training is a group of `data.batch_size` samples. `adaptive` measures distances relative to
each weight's size (ASAM, Kwon et al. 2021), so that rescaling the layers of a network does not change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from esam_dist.data import Batch
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.sharpness.hessian import Estimate
from esam_dist.sharpness.objective import Direction, Objective, norm


def worst_case(objective: Objective, rhos: Sequence[float], m: int, *, adaptive: bool = False) -> list[Estimate]:
    """For each rho, the mean over groups of m samples of `l(w + eps) - l(w)`, where eps has norm rho and lies along the
    group's gradient: to first order the direction in which its loss rises most. The error is that over groups.

    Samples that fill no group are left out. Raises UserError, on all ranks, where no rank's share fills one.
    """
    rises: list[list[float]] = [[] for _ in rhos]
    for group in groups(objective.batches, m):
        loss = objective.losses(group).mean()
        direction = _unit(list(torch.autograd.grad(loss, objective.params)), objective, adaptive=adaptive)
        for rho, found in zip(rhos, rises, strict=True):
            with objective.at(direction, rho), torch.no_grad():
                found.append(float(objective.losses(group).double().mean()) - float(loss.detach()))
    return [_over_ranks(found, objective.ranks, m) for found in rises]


def average_case(
    objective: Objective, rhos: Sequence[float], draws: int, *, adaptive: bool = False, seed: int = 0
) -> list[Estimate]:
    """For each rho, the mean of `L(w + rho u) - L(w)` over random unit vectors u; L is the loss over all samples.

    With `adaptive`, u is each weight's size times a random unit vector.
    """
    generator = torch.Generator().manual_seed(seed)
    base = objective.loss()
    rises: list[list[float]] = [[] for _ in rhos]
    for _ in range(draws):
        random = [torch.randn(param.shape, generator=generator).to(param) for param in objective.params]
        length = norm(random)
        if adaptive:
            random = [part * param.detach().abs() for part, param in zip(random, objective.params, strict=True)]
        for rho, found in zip(rhos, rises, strict=True):
            with objective.at(random, rho / length):
                found.append(objective.loss() - base)
    return [Estimate.of(found) for found in rises]


def groups(batches: Sequence[Batch], m: int) -> Iterator[Batch]:
    """The samples of `batches` in order, m at a time; a rest smaller than m is left out."""
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    for start in range(0, len(labels) - m + 1, m):
        yield Batch(images[start : start + m], labels[start : start + m])


def _unit(gradient: Direction, objective: Objective, *, adaptive: bool) -> Direction:
    """The gradient divided by its norm; or ASAM's `T^2 g / |T g|` with T = |w|, of norm 1 where `|eps / T|` counts."""
    if adaptive:
        sizes = [param.detach().abs() for param in objective.params]
        scaled = [size * part for size, part in zip(sizes, gradient, strict=True)]
        length = norm(scaled)
        gradient = [size * part for size, part in zip(sizes, scaled, strict=True)]
    else:
        length = norm(gradient)
    return [part / length if length else torch.zeros_like(part) for part in gradient]


def _over_ranks(rises: list[float], ranks: Ranks, m: int) -> Estimate:
    found = torch.tensor(rises, dtype=torch.float64)
    totals = torch.stack([torch.tensor(float(len(rises)), dtype=torch.float64), found.sum(), found.square().sum()])
    count, total, squares = ranks.sum_(totals.to(ranks.device)).tolist()
    if not count:
        raise UserError(f"--group-size {m}: no rank has so many samples; raise --samples, or take a smaller one")
    mean = total / count
    if count < 2:
        return Estimate(mean, float("nan"))
    return Estimate(mean, (max(0.0, squares / count - mean**2) / (count - 1)) ** 0.5)
