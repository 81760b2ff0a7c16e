"""Scores of W ranks with B samples each, as in training, for the simulation.

Rises of the loss, heavy-tailed: 60% of the samples learned (log-normal, median 0.001), 35% in question (0.1), 5% hard
or mislabelled (1); every fifth rise is a fall, a quarter as large. A rank effect multiplies all scores of a rank by
exp(tau * z), z normal. `digits`: drawn from real training, see record.py.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
NUM_RANKS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]

Row = dict[str, str | int | float]
Distribution = Callable[[int, int], Tensor]


def mixture(W: int, B: int, tau: float, saturated: float = 0.0) -> Tensor:
    """Rises as in training, [W, B]; the share `saturated` is exactly zero, like losses too small for float32."""
    kind = torch.rand(W, B)
    median = torch.full((W, B), 1e-3).where(kind < 0.60, 0.1).where(kind < 0.95, 1.0)
    sigma = torch.full((W, B), 1.5).where(kind < 0.60, 1.0).where(kind < 0.95, 0.5)
    rise = median * torch.exp(sigma * torch.randn(W, B))
    rise = rise.where(torch.rand(W, B) < 0.8, -rise / 4) * torch.exp(tau * torch.randn(W, 1))
    return rise.masked_fill(torch.rand(W, B) < saturated, 0.0)


def digits(W: int, B: int, shards: str) -> Tensor:
    """Each rank draws from one recorded rank's rises, 32 of the third epoch, jittered by 1% lest it draw ties."""
    with (RESULTS / "scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["shards"] == shards and row["epoch"] == "3"]
    recorded = torch.tensor([float(row["rise"]) for row in rows]).view(-1, 32)
    drawn = recorded[torch.randint(len(recorded), (W, 1)), torch.randint(32, (W, B))]
    return drawn * (1.0 + 0.01 * torch.randn(W, B))


SCORES: dict[str, Distribution] = {
    "alike ranks": partial(mixture, tau=0.0),
    "rank effect 0.5": partial(mixture, tau=0.5),
    "rank effect 1": partial(mixture, tau=1.0),
    "rank effect 2": partial(mixture, tau=2.0),
    "60% zero, rank effect 0.5": partial(mixture, tau=0.5, saturated=0.6),
    "digits, shuffled": partial(digits, shards="shuffled"),
    "digits, two classes a rank": partial(digits, shards="two classes"),
}


def num_trials(W: int) -> int:
    """Fewer where each one averages over more ranks."""
    return max(3, min(40, 640 // W))
