"""Every rule for the choice among ranks, against the exact one: those taken, and those that were not.

Shapes: W ranks, B samples per rank, Q quantiles per rank.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.coordination.draws import NUM_RANKS, SCORES, Row, num_trials
from esam_dist.step import selection

FACTORS = [1.0, 1.25, 1.5, 2.0, math.inf]


def simulate_stragglers(B: int) -> list[Row]:
    """Of every distribution, number of ranks, gamma and capacity: means over trials.

    Besides, two rules that were not taken: overflow dropped, and equal scores kept in the order of ranks.
    """
    rows: list[Row] = []
    for name, draw in SCORES.items():
        for W in NUM_RANKS:
            tables = [draw(W, B) for _ in range(num_trials(W))]
            for gamma in (0.25, 0.5):
                exact = [selection.select(scores_WB, gamma) for scores_WB in tables]
                for factor in FACTORS:
                    most = None if factor == math.inf else selection.capacity(gamma, B, factor)
                    kept = [selection.select(scores_WB, gamma, most) for scores_WB in tables]
                    keys = _keys(name, W, B, gamma, factor, "passed on")
                    rows.append(compare(tables, exact, kept, gamma, most) | keys)
                    if factor in (1.25, 1.5):
                        kept = [drop_overflow(*both, most or B) for both in zip(tables, exact, strict=True)]
                        keys = _keys(name, W, B, gamma, factor, "dropped")
                        rows.append(compare(tables, exact, kept, gamma, most) | keys)
                tilted = [scores_WB - 1e-12 * torch.arange(W).unsqueeze(1) for scores_WB in tables]
                kept = [selection.select(scores_WB, gamma) for scores_WB in tilted]
                keys = _keys(name, W, B, gamma, math.inf, "ties to the first ranks")
                rows.append(compare(tables, exact, kept, gamma) | keys)
    return rows


def drop_overflow(scores_WB: Tensor, kept_WB: Tensor, capacity: int) -> Tensor:
    """The rule that was not taken: the exact choice, less what exceeds the capacity of a rank."""
    place_WB = scores_WB.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return kept_WB & (place_WB < capacity)


def compare(
    tables: list[Tensor], exact: list[Tensor], kept: list[Tensor], gamma: float, capacity: int | None = None
) -> Row:
    """What a choice costs and what it misses of the exact one.

    descent_inflation: samples in the slowest rank's descent, over the wanted ones of a mean rank; under a capacity
    every rank's batch is filled up to it. step_inflation: of a paper step at beta 0.5 (ascent 2.5, scoring 1, descent
    3 gamma), with the descent's. rise_kept: sum of the kept rises over the exact choice's.
    """
    W = len(exact[0])
    slowest = _mean(
        [(capacity or int(mask.sum(1).max())) * W / int(best.sum()) for mask, best in zip(kept, exact, strict=True)]
    )
    return {
        "descent_inflation": slowest,
        "step_inflation": (3.5 + 3 * gamma * slowest) / (3.5 + 3 * gamma),
        "kept_of_wanted": _mean([int(mask.sum()) / int(best.sum()) for mask, best in zip(kept, exact, strict=True)]),
        "missed_share": _mean(
            [int((best & ~mask).sum()) / int(best.sum()) for mask, best in zip(kept, exact, strict=True)]
        ),
        "rise_kept": _mean(
            [
                float(scores_WB[mask].sum() / scores_WB[best].sum())
                for scores_WB, mask, best in zip(tables, kept, exact, strict=True)
            ]
        ),
    }


def _keys(name: str, W: int, B: int, gamma: float, factor: float, overflow: str) -> Row:
    return {"scores": name, "W": W, "B": B, "gamma": gamma, "capacity_factor": factor, "overflow": overflow}


def simulate_thresholds(B: int) -> list[Row]:
    """The choice by quantiles against the exact one under the same capacity."""
    rows: list[Row] = []
    for name, draw in SCORES.items():
        for W in (2, 8, 64, 256, 1024):
            tables = [draw(W, B) for _ in range(max(3, num_trials(W) // 2))]
            for gamma, factor in ((0.25, 1.25), (0.5, 1.25), (0.5, math.inf)):
                most = None if factor == math.inf else selection.capacity(gamma, B, factor)
                exact = [selection.select(scores_WB, gamma, most) for scores_WB in tables]
                for Q in (4, 8, 16, 32):
                    for rule in (by_threshold, by_allotment):
                        kept = [rule(scores_WB, gamma, Q, most) for scores_WB in tables]
                        keys: Row = {
                            "rule": rule.__name__,
                            "Q": Q,
                            "bound": error_bound(W, B, Q, most, gamma, "zero" in name),
                        }
                        keys |= errors(tables, exact, kept)
                        rows.append(_keys(name, W, B, gamma, factor, "passed on") | keys)
    return rows


def by_threshold(scores_WB: Tensor, gamma: float, num_quantiles: int, capacity: int | None) -> Tensor:
    """The transport `thresholds`, all ranks at once."""
    gathered = quantiles_of_ranks(scores_WB, num_quantiles, capacity)
    threshold = selection.shared_threshold(gathered, gamma, scores_WB.shape[1], capacity)
    kept: Tensor = torch.vmap(partial(selection.select_above, threshold=threshold, capacity=capacity))(scores_WB)
    return kept


def by_allotment(scores_WB: Tensor, gamma: float, num_quantiles: int, capacity: int | None) -> Tensor:
    """The same quantiles, read otherwise: scores interpolated between them tell every rank how many it shall keep.

    The total is then known beforehand, without a second collective; the ranks' thresholds differ a little.
    """
    W, B = scores_WB.shape
    limit = B if capacity is None else min(B, capacity)
    gathered = quantiles_of_ranks(scores_WB, num_quantiles, capacity)
    # The quantiles of falling scores 0, -1, -2, ... tell which places of a ranking they are taken from.
    place = -selection.quantiles(-torch.arange(B), num_quantiles, capacity).round().long()
    extra = torch.arange(1, limit)
    right = torch.searchsorted(place, extra).clamp(max=num_quantiles - 1)
    left = (right - 1).clamp(min=0)
    weight = ((extra - place[left]) / (place[right] - place[left]).clamp(min=1)).clamp(0.0, 1.0)
    guess = torch.lerp(gathered[:, left], gathered[:, right], weight.double())
    wanted = selection.num_kept(gamma, W * B, at_least=W, at_most=W * limit) - W
    best = guess.T.flatten().argsort(descending=True, stable=True)[:wanted]
    number_W = 1 + torch.bincount(best % W, minlength=W)
    place_WB = scores_WB.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return place_WB < number_W.unsqueeze(1)


def quantiles_of_ranks(scores_WB: Tensor, num_quantiles: int, capacity: int | None) -> Tensor:
    """What every rank sends, gathered: [W, Q]."""
    gathered: Tensor = torch.vmap(partial(selection.quantiles, num_quantiles=num_quantiles, capacity=capacity))(
        scores_WB
    )
    return gathered


def error_bound(W: int, B: int, num_quantiles: int, capacity: int | None, gamma: float, ties: bool) -> float:
    """The bound of `shared_threshold` on the error of the total, as a share of it; `ties`: ranks hold equal scores."""
    gap = math.ceil((capacity or B) / (num_quantiles + 1))
    jump = W * gap if ties else gap
    return (W * (gap - 1) + jump) // 2 / selection.num_kept(gamma, W * B, at_least=W)


def errors(tables: list[Tensor], exact: list[Tensor], kept: list[Tensor]) -> Row:
    """total_error: of the number kept, as a share; its mean is the bias of weights that took it for exact.

    differing_share: samples kept by one choice only, over those kept by both choices, counted twice.
    mean_rise: of a kept sample, over the exact choice's.
    """
    totals = [int(mask.sum()) / int(best.sum()) - 1.0 for mask, best in zip(kept, exact, strict=True)]
    differing = [
        int((mask ^ best).sum()) / int(mask.sum() + best.sum()) for mask, best in zip(kept, exact, strict=True)
    ]
    rises = [
        float(scores_WB[mask].mean() / scores_WB[best].mean())
        for scores_WB, mask, best in zip(tables, kept, exact, strict=True)
    ]
    return {
        "total_error_mean": _mean(totals),
        "total_error_absolute": _mean([abs(total) for total in totals]),
        "total_error_largest": max(abs(total) for total in totals),
        "differing_share": _mean(differing),
        "mean_rise": _mean(rises),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
