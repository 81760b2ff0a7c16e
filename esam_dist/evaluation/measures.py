"""What predictions amount to: pure functions of arrays, the same on any number of ranks.

Letters: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esam_dist.evaluation.predictions import Array, Predictions
from esam_dist.findings import Bin, ClassScore

BINS = 15
"""Of the calibration error, as Guo et al. 2017 (arXiv 1706.04599) take them: equal, over (0, 1]."""


def class_scores(found: Predictions, names: Sequence[str]) -> list[ClassScore]:
    """Samples and accuracy of every class."""
    counts = np.bincount(found.labels, minlength=len(names)).tolist()
    right = np.bincount(found.labels[found.is_right], minlength=len(names)).tolist()
    return [
        ClassScore(name=name, count=count, accuracy=hits / count if count else None)
        for name, count, hits in zip(names, counts, right, strict=True)
    ]


def confusion(found: Predictions) -> list[tuple[int, int, int]]:
    """(true class, predicted class, samples) of every pair that occurs, in order."""
    pairs, counts = np.unique(np.stack([found.labels, found.predicted], axis=1), axis=0, return_counts=True)
    return [(true, predicted, count) for (true, predicted), count in zip(pairs.tolist(), counts.tolist(), strict=True)]


def calibration(confidence: Array, is_right: Array, num_bins: int = BINS) -> tuple[float, list[Bin]]:
    """The expected calibration error, and its bins: sum over bins of share * |accuracy - mean confidence|."""
    edges = np.arange(num_bins + 1) / num_bins
    # A confidence on an edge belongs below it.
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    bins, error = [], 0.0
    for number in range(num_bins):
        here = place == number
        count = int(here.sum())
        told = float(confidence[here].mean()) if count else None
        true = float(is_right[here].mean()) if count else None
        if told is not None and true is not None:
            error += count / len(confidence) * abs(true - told)
        bins.append(
            Bin(low=edges[number], high=edges[number + 1], count=count, confidence=told, accuracy=true),
        )
    return error, bins


def worst(found: Predictions, count: int) -> list[int]:
    """The places of the `count` mistakes with the highest loss, that first; of equals the earlier sample."""
    wrong = np.flatnonzero(~found.is_right)
    chosen: list[int] = wrong[np.argsort(-found.loss[wrong], kind="stable")][:count].tolist()
    return chosen
