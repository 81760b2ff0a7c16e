"""Where the methods that select samples climb, and how far."""

from __future__ import annotations

import math

from esam_dist.methods.directions import Directed
from esam_dist.step.swp import Draw
from tests.multiprocess.simulation.weights import Weights, mean, norm, plus, times
from tests.multiprocess.simulation.world import World


def along(direction: Weights, radius: float) -> Weights:
    """`radius * d / ||d||`; nothing where d is zero."""
    length = norm(direction)
    return times(direction, radius / length) if length > 0.0 else {}


def radius(rho: float, beta: float, scale: str) -> float:
    return {"none": rho, "paper": rho / math.sqrt(beta), "released": rho / beta}[scale]


def climb(method: Directed, world: World, drawn: list[Draw], clean: list[Weights] | None = None) -> list[Weights]:
    """Each rank's direction over its drawn weights; `clean`: the gradients, where they are known already."""
    if method.direction == "momentum":
        found = [times(world.velocity, -1.0)] * len(world.ranks)
    elif method.direction == "previous":
        found = [world.memory.get("previous", {})] * len(world.ranks)
    else:
        clean = clean or world.clean()
        found = {"gradient": lambda *_: clean, "average": average, "residual": residual}[method.direction](
            method, world, clean
        )
    if needs_look(method, world):
        for rank in world.ranks:
            rank.gradient(world.weights, is_clean=True)
    return [rank.compensated(d, draw) if d else {} for rank, d, draw in zip(world.ranks, found, drawn, strict=True)]


def needs_look(method: Directed, world: World) -> bool:
    """Whether the scores need a pass at w that no direction has made."""
    selects = method.gamma(world.epoch) < 1.0 and method.score != "random"
    return selects and not world.ranks[0].buffers


def average(method: Directed, world: World, clean: list[Weights]) -> list[Weights]:
    """VaSSO: `d = (1 - theta) d + theta g`; what all ranks remember is the mean of their d."""
    before, theta = world.memory.get("average"), 1.0 - method.decay
    found = clean if before is None else [plus(times(before, 1.0 - theta), g, theta) for g in clean]
    world.memory["average"] = mean(found)
    return found


def residual(method: Directed, world: World, clean: list[Weights]) -> list[Weights]:
    """F-SAM: `g - sigma * m`, and then `m = decay * m + (1 - decay) * g`."""
    before = world.memory.get("average")
    if before is None:
        world.memory["average"] = mean(clean)
        return clean
    world.memory["average"] = plus(times(before, method.decay), mean(clean), 1.0 - method.decay)
    return [plus(g, before, -method.sigma) for g in clean]
