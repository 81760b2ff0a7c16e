"""Which samples each rank keeps, in plain Python: the rules of docs/coordination.md, by sorting lists.

`scores[rank][i]` is the score of sample i of a rank; what is returned are each rank's positions, ascending.
"""

from __future__ import annotations

import math

import torch

from esam_dist.step.choice import Sds


def choose(scores: list[list[float]], sds: Sds) -> list[list[int]]:
    """At least one sample of each rank, at most its capacity."""
    if sds.scope == "rank":
        count = count_kept(sds.gamma, len(scores[0]))
        return [sorted(best_first(mine)[:count]) for mine in scores]
    if sds.transport == "thresholds":
        return by_threshold(scores, sds)
    W, B = len(scores), len(scores[0])
    rankings = [best_first(mine) for mine in scores]
    kept = [ranking[:1] for ranking in rankings]
    # Of equal scores those that rank first among their own rank's, then those of the first ranks.
    places = ((-scores[r][i], place, r, i) for r, ranking in enumerate(rankings) for place, i in enumerate(ranking))
    most = capacity(sds, B) or B
    for _, _, r, i in sorted(places):
        if sum(map(len, kept)) < count_over_ranks(sds, W, B) and i not in kept[r] and len(kept[r]) < most:
            kept[r].append(i)
    return [sorted(index) for index in kept]


def by_threshold(scores: list[list[float]], sds: Sds) -> list[list[int]]:
    """Every rank names its scores at a few places of its ranking; of these values the one is taken as the threshold
    above which, by the places, all ranks together keep nearest to what is wanted.
    """
    W, B, Q = len(scores), len(scores[0]), sds.num_quantiles
    limit = capacity(sds, B) or B
    # The score's type on the way; sorted stably, so that of equal ones the first counts as larger.
    scores = [torch.tensor(mine, dtype=torch.float32).tolist() for mine in scores]
    rankings = [best_first(mine) for mine in scores]
    places = [min(math.ceil(q * limit / (Q + 1)), limit - 1) for q in range(Q + 1)] + [limit]
    named = [[mine[ranking[place]] for place in places[1:-1]] for mine, ranking in zip(scores, rankings, strict=True)]

    def estimate(threshold: float) -> float:
        """How many samples lie at or above it, after each rank's best: the middle of what a rank's q values allow."""
        counts = [sum(value >= threshold for value in values) for values in named]
        return sum((places[q] + places[q + 1] - 1) / 2 for q in counts)

    wanted = count_over_ranks(sds, W, B) - W
    # All samples lie half a sample beyond what the lowest value's estimate would say.
    candidates = [(-math.inf, estimate(-math.inf) + 0.5)]
    candidates += [(value, estimate(value)) for value in sorted((v for values in named for v in values), reverse=True)]
    candidates += [(math.inf, estimate(math.inf))]
    threshold = min(candidates, key=lambda candidate: abs(candidate[1] - wanted))[0]
    return [
        sorted(i for place, i in enumerate(ranking[:limit]) if place == 0 or mine[i] >= threshold)
        for mine, ranking in zip(scores, rankings, strict=True)
    ]


def padded(index: list[int], sds: Sds, num_samples: int) -> list[int]:
    """What the descent runs on: under a capacity the kept samples over and over, until the batch is full.

    One sample alone goes twice: BatchNorm takes no batch of one value.
    """
    size = max(capacity(sds, num_samples), len(index), min(2, num_samples))
    return [index[i % len(index)] for i in range(size)]


def capacity(sds: Sds, num_samples: int) -> int:
    """The most that a rank may keep; 0: no limit."""
    factor = min(sds.capacity_factor * sds.gamma, 1.0)
    return max(1, math.ceil(factor * num_samples - 1e-9)) if factor else 0


def count_over_ranks(sds: Sds, num_ranks: int, num_samples: int) -> int:
    """How many all ranks are to keep together."""
    most = capacity(sds, num_samples) or num_samples
    return min(max(count_kept(sds.gamma, num_ranks * num_samples), num_ranks), most * num_ranks)


def count_kept(gamma: float, num_samples: int) -> int:
    """The share `gamma`, rounded half up, at least one."""
    return max(1, math.floor(gamma * num_samples + 0.5))


def best_first(scores: list[float]) -> list[int]:
    """Positions by falling score; of equal scores the first in the batch first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))
