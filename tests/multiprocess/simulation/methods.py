"""One function a method: from all ranks' batches to the gradient of the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esam_dist.methods import ASAM, ESAM, FSAM, GSAM, MSAM, S2SAM, SAM, SGD, LookSAM, Recycled, VaSSO
from esam_dist.step import swp
from tests.multiprocess.simulation.ascent import along, climb, radius
from tests.multiprocess.simulation.choice import best_first, count_kept
from tests.multiprocess.simulation.selection import descend, draw_scores, resolved
from tests.multiprocess.simulation.weights import Weights, dot, mean, norm, plus, times
from tests.multiprocess.simulation.world import World


def sgd(_: SGD, world: World) -> Weights:
    return mean(world.clean())


def sam(method: SAM, world: World) -> Weights:
    """Foret et al., equations 2 and 3, each rank with its own gradient."""
    rho = method.rho(world.epoch)
    return mean(world.sharp([along(g, rho) for g in world.clean()]))


def asam(method: ASAM, world: World) -> Weights:
    """Kwon et al., equation 7: `eps = rho * T^2 g / ||T g||` with `T = |w| + eta`."""
    rho = method.rho(world.epoch)
    T = {name: weight.abs() + method.eta for name, weight in world.weights.items()}
    eps = []
    for g in world.clean():
        Tg = {name: T[name] * g[name] for name in g}
        eps.append({name: rho * T[name] * Tg[name] / norm(Tg) for name in g})
    return mean(world.sharp(eps))


def gsam(method: GSAM, world: World) -> Weights:
    """Zhuang et al., Algorithm 1: the perturbed gradient, less alpha times the clean one's part orthogonal to it."""
    rho, found = method.rho(world.epoch), []
    clean = world.clean()
    for g, sharp in zip(clean, world.sharp([along(g, rho) for g in clean]), strict=True):
        orthogonal = plus(g, sharp, -dot(g, sharp) / dot(sharp, sharp))
        found.append(plus(sharp, orthogonal, -method.alpha))
    return mean(found)


def looksam(method: LookSAM, world: World) -> Weights:
    """Liu et al., Algorithm 1: the part of the perturbed gradient that is orthogonal to the clean one is used again."""
    clean, flat = world.clean(), world.memory.get("flat")
    if world.update % method.interval and flat is not None:
        return mean([plus(g, flat, method.alpha * norm(g) / norm(flat)) for g in clean])
    sharp = world.sharp([along(g, method.rho(world.epoch)) for g in clean])
    world.memory["flat"] = mean([plus(s, g, -dot(g, s) / dot(g, g)) for g, s in zip(clean, sharp, strict=True)])
    return mean(sharp)


def msam(method: MSAM, world: World) -> Weights:
    """Becker et al., Algorithm 1: against the momentum, in one pass."""
    eps = along(times(world.velocity, -1.0), method.rho(world.epoch))
    return mean(world.sharp([eps] * len(world.ranks)))


def fsam(method: FSAM, world: World) -> Weights:
    """Li et al., Algorithm 1: the direction is `g - sigma * m`, with m from before this step; m begins as g."""
    clean, m = world.clean(), world.memory.get("average")
    eps = [along(g if m is None else plus(g, m, -method.sigma), method.rho(world.epoch)) for g in clean]
    g = mean(clean)
    world.memory["average"] = g if m is None else plus(times(m, method.decay), g, 1.0 - method.decay)
    return mean(world.sharp(eps))


def vasso(method: VaSSO, world: World) -> Weights:
    """Li and Giannakis, equation 5: `d = (1 - theta) d + theta g`, and d begins as g."""
    clean, d = world.clean(), world.memory.get("average")

    def moved(g: Weights) -> Weights:
        return g if d is None else plus(times(d, 1.0 - method.theta), g, method.theta)

    sharp = world.sharp([along(moved(g), method.rho(world.epoch)) for g in clean])
    world.memory["average"] = moved(mean(clean))
    return mean(sharp)


def s2sam(method: S2SAM, world: World) -> Weights:
    """Along the averaged gradient of the update before; the first is plain."""
    before = world.memory.get("previous")
    eps = {} if before is None else along(before, method.rho(world.epoch))
    found = mean(world.sharp([eps] * len(world.ranks)))
    world.memory["previous"] = found
    return found


def esam(method: ESAM, world: World) -> Weights:
    """Du et al., Algorithm 1, the samples chosen by every rank for itself or by all together."""
    beta = 1.0 if method.swp == "norm" else method.beta(world.epoch)
    sds = resolved(method, world.epoch)
    drawn = [swp.draw(world.network, method.swp, beta, rank.generator) for rank in world.ranks]
    scores = draw_scores(sds, world)
    length = radius(method.rho(world.epoch), beta, method.swp_scale)
    eps = [along(d, length) for d in climb(method, world, drawn)]
    return descend(sds, world, eps, scores)[0]


def recycled(method: Recycled, world: World) -> Weights:
    """`(1 - gamma) g(w) + gamma g_kept(w + eps)`; `exact`: g(w) of just the samples that are not kept."""
    sds = resolved(method, world.epoch)
    share = sds.gamma
    scores = draw_scores(sds, world)
    if method.exact:
        size = world.ranks[0].size
        count = count_kept(sds.gamma, size)
        share = count / size
        kept = [sorted(best_first(mine)[:count]) for mine in scores]
        again = world.clean([sorted(best_first(mine)[count:]) for mine in scores])
        clean = [plus(times(g, 1.0 - share), k, share) for g, k in zip(again, world.clean(kept), strict=True)]
    else:
        again = clean = world.clean()
    everything = [swp.Draw([param for param in world.network.parameters() if param.requires_grad])] * len(world.ranks)
    eps = [along(d, method.rho(world.epoch)) for d in climb(method, world, everything, clean)]
    return plus(times(mean(again), 1.0 - share), descend(sds, world, eps, scores)[0], share)


METHODS: dict[str, Callable[[Any, World], Weights]] = {
    function.__name__: function
    for function in (sgd, sam, asam, gsam, looksam, msam, fsam, vasso, s2sam, esam, recycled)
}
