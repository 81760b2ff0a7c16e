"""Scores of any kind for property tests of the selection, and its rule in plain Python.

Shapes: W ranks, B samples per rank.
"""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from esam_dist.step import selection

LIMIT = torch.finfo(torch.float32).max
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf])
FRACTIONS = st.floats(0.0, 1.0)

# No deadline: on a busy machine any torch call may take longer than hypothesis allows.
some = settings(deadline=None)
many = settings(deadline=None, max_examples=300)


@st.composite
def tables(draw: st.DrawFn, max_ranks: int = 9) -> Tensor:
    """Scores [W, B] of any kind: distinct, tied, not finite, or all of one value."""
    W, B = draw(st.integers(1, max_ranks)), draw(st.integers(1, 24))
    element = draw(st.sampled_from([ANY, TIED, st.just(draw(TIED)), st.floats(-1.0, 1.0, width=32)]))
    return torch.tensor(draw(st.lists(element, min_size=W * B, max_size=W * B)), dtype=torch.float32).view(W, B)


def capacities(max_capacity: int = 30) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(1, max_capacity)


def ordered(score: float) -> float:
    """A score as selection orders it: NaN below all, infinities at the ends of what a float32 holds."""
    return -math.inf if math.isnan(score) else min(max(score, -LIMIT), LIMIT)


def reference(scores_WB: Tensor, fraction: float, capacity: int | None) -> list[list[bool]]:
    """The rule in plain Python: every rank's best, then one sort over what ranks have room for."""
    table = [[ordered(score) for score in row] for row in scores_WB.tolist()]
    W, B = len(table), len(table[0])
    limit = B if capacity is None else min(B, capacity)
    total = min(W * limit, max(W, math.floor(fraction * W * B + 0.5)))
    rankings = [sorted(range(B), key=lambda sample, row=row: (-row[sample], sample))[:limit] for row in table]
    kept = [[sample == ranking[0] for sample in range(B)] for ranking in rankings]
    rest = [
        (-table[rank][sample], place, rank, sample)
        for rank, ranking in enumerate(rankings)
        for place, sample in enumerate(ranking)
        if place > 0
    ]
    for _, _, rank, sample in sorted(rest)[: total - W]:
        kept[rank][sample] = True
    return kept


def above_threshold(scores_WB: Tensor, fraction: float, num_quantiles: int, capacity: int | None) -> Tensor:
    """What all ranks keep together, as they would find it: bool [W, B]."""
    gathered_WQ = torch.stack([selection.quantiles(row, num_quantiles, capacity) for row in scores_WB])
    threshold = selection.shared_threshold(gathered_WQ, fraction, scores_WB.shape[1], capacity)
    return torch.stack([selection.select_above(row, threshold, capacity) for row in scores_WB])
