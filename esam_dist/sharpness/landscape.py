"""The loss along random directions through the weights, each filter of a direction as long as the network's own.

That (Li et al. 2018, "Visualizing the loss landscape of neural nets", section 4) makes pictures of networks of other
scales comparable. Biases and the parameters of normalisation layers do not move, as in the paper's pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esam_dist.sharpness.objective import Direction, Objective


def filter_normalised(objective: Objective, generator: torch.Generator) -> Direction:
    """A random direction whose filters (rows of matrices) have the norms of the network's; zero for vectors."""
    return [_like(param, torch.randn(param.shape, generator=generator).to(param)) for param in objective.params]


def along_line(objective: Objective, places: list[float], *, seed: int = 0) -> list[float]:
    """The loss at `w + a d` for each place a, with one random direction d."""
    direction = filter_normalised(objective, torch.Generator().manual_seed(seed))
    return [_loss_at(objective, [(direction, place)]) for place in places]


def on_plane(objective: Objective, places: list[float], *, seed: int = 0) -> list[list[float]]:
    """The loss at `w + a d + b e`: a row for each place b, in it a number for each place a."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (filter_normalised(objective, generator) for _ in range(2))
    return [[_loss_at(objective, [(first, a), (second, b)]) for a in places] for b in places]


def evenly(half_width: float, count: int) -> list[float]:
    """`count` places from `-half_width` to `half_width`; an odd count has 0 among them."""
    return [half_width * (2 * i / (count - 1) - 1) for i in range(count)]


def _loss_at(objective: Objective, moves: list[tuple[Direction, float]]) -> float:
    parts = zip(*([factor * part for part in direction] for direction, factor in moves), strict=True)
    with objective.at([torch.stack(list(shares)).sum(dim=0) for shares in parts]):
        return objective.loss()


def _like(param: Tensor, random: Tensor) -> Tensor:
    if param.dim() < 2:
        return torch.zeros_like(param)
    wanted, given = param.detach().flatten(1).norm(dim=1), random.flatten(1).norm(dim=1)
    normalised: Tensor = random * (wanted / given).view(-1, *[1] * (param.dim() - 1))
    return normalised
