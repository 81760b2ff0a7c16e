"""Which samples the descent keeps (SDS, section 3.3 of the ESAM paper): pure tensors in, mask out.

Shapes: W ranks, B samples per rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_kept(fraction: float, num_samples: int, at_least: int = 1) -> int:
    """How many of `num_samples` a share `fraction` keeps: rounded half up, never fewer than `at_least`."""
    return min(num_samples, max(at_least, int(fraction * num_samples + 0.5)))


def select(scores_WB: Tensor, fraction: float) -> Tensor:
    """Keep the share `fraction` of all samples with the largest scores, and at least one of every rank.

    `scores_WB`: float [W, B]; a score that is NaN ranks last. Returns bool [W, B] with exactly
    `num_kept(fraction, W * B, at_least=W)` samples kept. Equal scores are kept in the order of rank, then of
    position, so every rank that sees the same scores comes to the same answer.
    """
    W, B = scores_WB.shape
    ranking = _finite(scores_WB)
    # Each rank's best sample goes first, whatever its score: a rank without work would stall the collectives.
    best = torch.zeros_like(ranking, dtype=torch.bool)
    best.scatter_(1, ranking.argmax(dim=1, keepdim=True), value=True)
    ranking = ranking.masked_fill(best, torch.inf).flatten()
    kept = torch.zeros(W * B, dtype=torch.bool, device=scores_WB.device)
    kept[ranking.argsort(descending=True, stable=True)[: num_kept(fraction, W * B, at_least=W)]] = True
    return kept.view(W, B)


def threshold(scores_WB: Tensor, kept_WB: Tensor) -> Tensor:
    """The smallest score among the kept samples: a scalar on the scores' device."""
    return _finite(scores_WB).masked_fill(~kept_WB, torch.inf).min()


def _finite(scores: Tensor) -> Tensor:
    """Scores with +inf and -inf at the ends of the finite range, so that +inf stays free, and NaN below them."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=-torch.inf, posinf=limits.max, neginf=limits.min)
