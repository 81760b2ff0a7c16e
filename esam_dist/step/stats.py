"""Where in the training a step lies, and what it has measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moment(NamedTuple):
    """Where in the training a step lies: what schedules and phases are functions of."""

    update: int = 0
    """Updates made before."""
    epoch: float = 0.0
    """Samples seen over samples in the set."""
    share: float = 0.0
    """Of the whole training that is done, in [0, 1]."""


class StepStats(NamedTuple):
    """What one step measured on this rank: scalars on the device, so that nothing waits for them."""

    loss: Tensor
    """Mean loss of the batch at the unperturbed weights (at the perturbed ones where no others were visited)."""
    sharpness: Tensor
    """Mean rise of the loss under the perturbation, over the samples evaluated at both; nan where there are none."""
    num_kept: Tensor
    """Samples that this rank's descent used."""
    threshold: Tensor
    """Smallest score kept; nan where nothing was scored."""
    skipped: Tensor
    """1 where the ascent direction was not finite and the weights stayed unperturbed, else 0."""
    grad_norm: Tensor
    """Norm of the averaged gradient before clipping; nan where the micro-batch ended no update."""
    skipped_update: Tensor
    """1 where that gradient was not finite, so that nothing was updated, else 0."""
    not_finite: Tensor
    """1 where a loss of this rank was not finite, at the weights or where the descent was, else 0."""

    @staticmethod
    def merged(groups: list[StepStats]) -> StepStats:
        """Of a batch whose groups have made a step each."""
        if len(groups) == 1:
            return groups[0]
        loss, sharpness, num_kept, threshold, skipped, grad_norm, skipped_update, not_finite = (
            torch.stack(each) for each in zip(*groups, strict=True)
        )
        return StepStats(
            *(loss.mean(), sharpness.nanmean(), num_kept.sum(), threshold[-1], skipped.sum(), grad_norm[-1]),
            *(skipped_update[-1], not_finite.max()),
        )
