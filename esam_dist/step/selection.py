"""Which samples the descent keeps (SDS, section 3.3 of the ESAM paper): tensors in, a mask out.

Two transports carry a choice among all ranks' samples. `scores`: every rank gathers every score, and `select` is
exact. `thresholds`: every rank gathers a fixed number of each rank's `quantiles`, derives one `shared_threshold` from
them, and keeps its own samples at or above it (`select_above`). Nothing here communicates, or waits for the
device.

Shapes: W ranks, B samples per rank, Q quantiles per rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_kept(fraction: float, num_samples: int, at_least: int = 1, at_most: int | None = None) -> int:
    """How many of `num_samples` a share `fraction` keeps: rounded half up, then held within the bounds."""
    most = num_samples if at_most is None else min(num_samples, at_most)
    return min(most, max(at_least, int(fraction * num_samples + 0.5)))


def capacity(fraction: float, num_samples: int, factor: float) -> int:
    """The most that one rank may keep of its `num_samples`: `factor` times its even share, rounded up, at least one.

    As in mixture-of-experts routing (GShard, arXiv 2006.16668, section 2.2). Raises ValueError for a factor below 1:
    the ranks together could not keep the share `fraction` then.
    """
    if not factor >= 1.0:
        raise ValueError(f"capacity factor {factor} is below 1: full ranks could not keep {fraction} of a batch")
    # 0.07 * 100 is 7.000000000000001, and seven samples are meant.
    return max(1, math.ceil(min(factor * fraction, 1.0) * num_samples - 1e-9))


def select(scores_WB: Tensor, fraction: float, capacity: int | None = None) -> Tensor:
    """Keep the share `fraction` of all samples with the largest scores: of every rank at least one, at most `capacity`.

    `scores_WB`: float [W, B]; a score that is NaN ranks last. Returns bool [W, B] with exactly
    `num_kept(fraction, W * B, at_least=W, at_most=W * capacity)` samples kept. What overflows a full rank is not
    dropped: the next best samples of ranks with room take its place. No other choice within the same bounds keeps a
    larger sum of scores, and the total depends on the shapes alone, so every rank knows it without counting.

    Equal scores are kept in the order of their place in their rank's own ranking, then of rank; within a rank, in the
    order of the batch. So every rank that sees the same scores comes to the same answer. Where many samples tie, as
    losses of exactly zero do, the ranks share them evenly.
    """
    W, B = scores_WB.shape
    limit = _limit(B, capacity)
    ranked_WB, order_WB = _finite(scores_WB).sort(dim=1, descending=True, stable=True)
    # Each rank's best sample goes first, whatever its score: a rank without work would stall the collectives.
    ranked_WB[:, 0] = torch.inf
    best_first = ranked_WB[:, :limit].T.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(B * W, dtype=torch.bool, device=scores_WB.device)
    kept.scatter_(0, best_first[: num_kept(fraction, W * B, at_least=W, at_most=W * limit)], value=True)
    return torch.zeros_like(order_WB, dtype=torch.bool).scatter_(1, order_WB, kept.view(B, W).T)


def threshold(scores_WB: Tensor, kept_WB: Tensor) -> Tensor:
    """The smallest score among the kept samples: a scalar on the scores' device."""
    return _finite(scores_WB).masked_fill(~kept_WB, torch.inf).min()


def quantiles(score_B: Tensor, num_quantiles: int, capacity: int | None = None) -> Tensor:
    """What one rank tells the others about its scores: float64 [Q], `8 * num_quantiles` bytes whatever B is.

    They are the scores at Q evenly spaced places of the rank's ranking, down to `capacity` (to B, if None). Below it
    nothing is kept, so nothing need be known. The best score is left out too, because it is kept in any case.
    """
    place_Q = _places(_limit(len(score_B), capacity), num_quantiles, score_B.device)[1:-1]
    return _distinct(score_B).sort(descending=True).values[place_Q]


def shared_threshold(quantiles_WQ: Tensor, fraction: float, num_samples: int, capacity: int | None = None) -> Tensor:
    """The score above which all ranks together keep about the share `fraction` of W * `num_samples`: float64 scalar.

    `quantiles_WQ`: every rank's `quantiles`, of `num_samples` each and made with the same `capacity`. With the
    result, the ranks' `select_above` together keep n samples more or fewer than `select` does, where

        n <= (W * (g - 1) + j) / 2,    g = ceil(capacity / (Q + 1))

    is the gap between places, and j is g where no two ranks hold equal scores and W * g in general; so n < W * g.
    The reason: take a rank with q quantiles at or above a value. Of its samples after the best, at least as many lie
    there as the q-th quantile's place says, and fewer than the next one's says; so the middle is wrong by (g - 1) / 2
    at most. From one value to the next the estimate of all ranks moves by j at most, and the nearer end is taken. With
    Q >= capacity - 1 and no equal scores among ranks, n is 0. Random errors cancel over ranks; docs/coordination.md
    has what remains.
    """
    W, Q = quantiles_WQ.shape
    limit = _limit(num_samples, capacity)
    wanted = num_kept(fraction, W * num_samples, at_least=W, at_most=W * limit) - W
    places = _places(limit, Q, quantiles_WQ.device)
    value, order = quantiles_WQ.flatten().sort(descending=True)
    # Twice the estimate, to keep to whole numbers. Equal values stand or fall together.
    double = (places[2:] - places[:-2]).repeat(W)[order].cumsum(0) + W * (places[1] - 1)
    double = double[torch.searchsorted(-value, -value, right=True) - 1]
    # Keeping all or none is possible too. All lies half a sample beyond the lowest value's estimate; else it would
    # always displace that one.
    most, least = W * (places[-2:].sum() - 1) + 1, W * (places[1] - 1)
    values = torch.cat([value.new_full((1,), -torch.inf), value, value.new_full((1,), torch.inf)])
    error = (torch.cat([most.view(1), double, least.view(1)]) - 2 * wanted).abs()
    return values.gather(0, error.argmin(keepdim=True)).squeeze(0)


def select_above(score_B: Tensor, threshold: Tensor, capacity: int | None = None) -> Tensor:
    """Keep this rank's samples at or above the `shared_threshold`, the best one in any case: bool [B].

    At most `capacity` of them are kept, the best; NaN ranks last. Overflow is dropped here, but `shared_threshold`
    does not count it: made with the same `capacity`, it already lies lower by what full ranks cannot take.
    """
    limit = _limit(len(score_B), capacity)
    ranked_B, order_B = _distinct(score_B).sort(descending=True)
    kept_B = ranked_B >= threshold
    kept_B[0] = True
    kept_B[limit:] = False
    return torch.zeros_like(kept_B).scatter_(0, order_B, kept_B)


def _limit(num_samples: int, capacity: int | None) -> int:
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity {capacity} leaves a rank without a sample: it must be at least 1")
    return num_samples if capacity is None else min(num_samples, capacity)


def _places(limit: int, num_quantiles: int, device: torch.device) -> Tensor:
    """Places 0 < p_1 <= .. <= p_Q < `limit` in a rank's ranking, and both ends: int [Q + 2]. The best is place 0."""
    step = torch.arange(num_quantiles + 2, device=device) * limit
    place = -(-step).div(num_quantiles + 1, rounding_mode="floor")
    place[:-1].clamp_(max=limit - 1)
    return place


def _finite(scores: Tensor) -> Tensor:
    """Scores with +inf and -inf moved to the ends of the finite range, so that +inf is free, and NaN below them."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=-torch.inf, posinf=limits.max, neginf=limits.min)


def _distinct(score_B: Tensor) -> Tensor:
    """Finite values in the order of `score_B` as float32, no two equal: float64 [B], NaN lowest.

    A float32 leaves the low 29 bits of a float64 at zero. The position goes there, so that of equal scores the first
    in the batch ranks first. Otherwise a threshold could not separate equal scores, such as losses of exactly zero,
    and would keep all of them or none.
    """
    limit = torch.finfo(torch.float32).max
    wide_B = score_B.float().double().nan_to_num(nan=-2.0 * limit, posinf=limit, neginf=-limit)
    # Zero would become a denormal number, which some processor settings treat as zero.
    wide_B = wide_B.masked_fill(wide_B == 0.0, 2.0**-200)
    position_B = torch.arange(len(score_B), device=score_B.device)
    offset_B = torch.where(wide_B < 0.0, position_B, len(score_B) - 1 - position_B)
    return (wide_B.view(torch.int64) + offset_B).view(torch.float64)
