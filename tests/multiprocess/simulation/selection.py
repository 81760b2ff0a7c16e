"""How the samples of a descent are scored, and the gradient of those kept."""

from __future__ import annotations

import torch

from esam_dist.methods.selective import Selective
from esam_dist.step.choice import Sds
from tests.multiprocess.simulation.choice import choose, padded
from tests.multiprocess.simulation.rank import Rank, gradient, leaves_of
from tests.multiprocess.simulation.weights import Weights, plus, times
from tests.multiprocess.simulation.world import World


def resolved(method: Selective, epoch: float) -> Sds:
    """The keys of `method`, with the value of its schedule."""
    where = (method.scope, method.transport, method.num_quantiles, method.capacity_factor)
    return Sds(method.gamma(epoch), method.score, *where)


def draw_scores(sds: Sds, world: World) -> list[list[float]]:
    """Of `score: random`; empty for others."""
    if sds.gamma >= 1.0 or sds.score != "random":
        return []
    return [torch.rand(rank.size, generator=rank.generator).tolist() for rank in world.ranks]


def descend(sds: Sds, world: World, eps: list[Weights], scores: list[list[float]]) -> tuple[Weights, list[list[int]]]:
    """The gradient at `w + eps` of the mean loss of all kept samples of all ranks, and which these are.

    `scores`: those that were drawn; the others are found here.
    """
    kept = [list(range(rank.size)) for rank in world.ranks]
    if sds.gamma < 1.0:
        kept = choose(scores or [score(sds, world, rank, e) for rank, e in zip(world.ranks, eps, strict=True)], sds)
    world.num_kept[:] = [len(index) for index in kept]
    total = times(world.weights, 0.0)
    for rank, e, index in zip(world.ranks, eps, kept, strict=True):
        leaves = leaves_of(world.at(e))
        # A capacity fills the batch with samples of weight 0, which BatchNorm sees.
        run = padded(index, sds, rank.size) if sds.gamma < 1.0 else index
        loss = rank.losses(leaves, run)[: len(index)].sum()
        total = plus(total, gradient(loss, leaves), 1.0 / sum(world.num_kept))
    return total, kept


def score(sds: Sds, world: World, rank: Rank, eps: Weights) -> list[float]:
    if sds.score == "loss":
        return rank.loss_B.tolist()
    if sds.score == "forward":
        with torch.no_grad():
            return (rank.losses_again(world.at(eps)) - rank.loss_B).tolist()
    # head: the inner product of each sample's gradient of the last layer with the batch's.
    leaves = leaves_of(world.weights)
    losses = rank.losses_again(leaves)
    head = [leaves["head.weight"], leaves["head.bias"]]
    mean = torch.autograd.grad(losses.mean(), head, retain_graph=True)
    each = [torch.autograd.grad(loss, head, retain_graph=True) for loss in losses]
    return [float(sum((a * b).sum() for a, b in zip(mine, mean, strict=True))) for mine in each]
