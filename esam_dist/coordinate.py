"""Selection over ranks: from each rank's scores to the samples that it keeps, and what they weigh.

Shapes: W ranks, B samples per rank, D samples that this rank runs the descent on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esam_dist import selection
from esam_dist.ranks import Pending, Ranks
from esam_dist.rule import Rule


class Kept(NamedTuple):
    """The samples of this rank's batch that the descent uses."""

    index_D: Tensor | slice
    """Positions in the batch, ascending; behind them, as padding that counts for nothing, the same again."""
    mean_over_ranks: Callable[[Tensor], Tensor]
    """From each one's loss [D] to a scalar which, averaged over ranks, is the mean over all ranks' kept samples."""
    num_kept: Tensor
    """How many count, a scalar on the device; padding does not."""
    threshold: Tensor
    """The smallest score kept, over the samples that competed; nan where none did."""


def keep_all(loss_B: Tensor) -> Kept:
    """Every sample: no selection, no copy of the images."""
    return Kept(
        slice(None), Tensor.mean, torch.full_like(loss_B[0], len(loss_B)), torch.full_like(loss_B[0], torch.nan)
    )


class Coordination:
    """One selection: begun when this rank's scores are known, ended when the samples are needed.

    What ranks exchange travels in between, behind whatever this rank computes meanwhile.
    """

    def __init__(self, score_B: Tensor, rule: Rule, ranks: Ranks) -> None:
        self._score_B, self._rule, self._ranks = score_B, rule, ranks
        self._capacity = None
        if rule.scope == "global" and rule.capacity_factor > 0.0:
            self._capacity = selection.capacity(rule.gamma, len(score_B), rule.capacity_factor)
        self._gathered: Pending | None = None
        if rule.scope == "global":
            sent = score_B
            if rule.transport == "thresholds":
                sent = selection.quantiles(score_B, rule.num_quantiles, self._capacity)
            self._gathered = ranks.gather_later(sent)

    def split(self) -> tuple[Tensor, Tensor]:
        """A selection within the rank as two lists of positions: those kept, and the rest."""
        order_B = _kept_first(selection.select(self._score_B.unsqueeze(0), self._rule.gamma)[0])
        return order_B[: self.num_within_rank], order_B[self.num_within_rank :]

    @property
    def num_within_rank(self) -> int:
        """How many a selection within the rank keeps."""
        return selection.num_kept(self._rule.gamma, len(self._score_B))

    def end(self) -> Kept:
        """The samples that this rank keeps."""
        if self._gathered is None:
            return self._within_rank()
        if self._rule.transport == "scores":
            return self._by_scores(self._gathered.wait())
        return self._by_threshold(self._gathered.wait())

    def _within_rank(self) -> Kept:
        kept_B = selection.select(self._score_B.unsqueeze(0), self._rule.gamma)[0]
        # A count known beforehand needs no word from the device; a sample that is alone goes twice, with the same mean.
        index_D = _kept_first(kept_B)[: self.num_within_rank]
        index_D = index_D.repeat(2) if len(index_D) < self._smallest else index_D
        num_kept = torch.full_like(self._score_B[0], self.num_within_rank)
        return Kept(index_D, Tensor.mean, num_kept, selection.threshold(self._score_B, kept_B))

    def _by_scores(self, score_WB: Tensor) -> Kept:
        """Every rank sees every score, so all come to the same exact answer, and know how many it keeps."""
        W, gamma = len(score_WB), self._rule.gamma
        kept_WB = selection.select(score_WB, gamma, self._capacity)
        most = None if self._capacity is None else W * self._capacity
        total = selection.num_kept(gamma, score_WB.numel(), at_least=W, at_most=most)
        return self._kept(kept_WB[self._ranks.rank], lambda: total, selection.threshold(score_WB, kept_WB))

    def _by_threshold(self, quantiles_WQ: Tensor) -> Kept:
        """Every rank derives the same threshold; how many that keeps must be told, behind the descent's forward."""
        score_B, gamma = self._score_B, self._rule.gamma
        threshold = selection.shared_threshold(quantiles_WQ, gamma, len(score_B), self._capacity)
        kept_B = selection.select_above(score_B, threshold, self._capacity)
        total = self._ranks.sum_later(kept_B.sum().float())
        return self._kept(kept_B, total.wait, threshold)

    def _kept(self, kept_B: Tensor, total: Callable[[], Tensor | int], threshold: Tensor) -> Kept:
        W, num_kept = self._ranks.world_size, kept_B.sum()
        # Without a capacity the batch's size is the count: the one place of a step where the host waits for the device.
        size = int(num_kept) if self._capacity is None else self._capacity
        index_D = _filled(kept_B, max(size, self._smallest))
        counts_D = torch.arange(len(index_D), device=kept_B.device) < num_kept
        return Kept(
            index_D, lambda loss_D: torch.where(counts_D, loss_D, 0.0).sum() * W / total(), num_kept.float(), threshold
        )

    @property
    def _smallest(self) -> int:
        """BatchNorm refuses a batch of one where its maps are a single pixel."""
        return min(2, len(self._score_B))


def _kept_first(kept_B: Tensor) -> Tensor:
    """All positions, those of the kept samples first, in ascending order each."""
    return kept_B.byte().argsort(descending=True, stable=True)


def _filled(kept_B: Tensor, size: int) -> Tensor:
    """`size` positions: those of the kept samples, of which there is at least one, and again from the first.

    So padding brings BatchNorm no other samples than those kept, and no number that is not finite.
    """
    place = torch.arange(size, device=kept_B.device)
    return _kept_first(kept_B)[place % kept_B.sum()]
