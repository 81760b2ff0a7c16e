"""Selection over ranks (SDS): from each rank's scores to the samples that it keeps, and what they weigh.

Shapes: W ranks, B samples per rank, D samples that this rank runs the descent on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from esam_dist.ranks import Pending, Ranks
from esam_dist.step import selection
from esam_dist.step.score import Head, Score


class Sds(NamedTuple):
    """How samples are chosen in one step (sharpness-sensitive data selection, with its schedules resolved)."""

    gamma: float = 1.0
    """Share kept."""
    score: Score = "forward"
    scope: Literal["rank", "global"] = "rank"
    transport: Literal["scores", "thresholds"] = "scores"
    """For `scope: global`, what ranks exchange."""
    num_quantiles: int = 16
    """For `transport: thresholds`."""
    capacity_factor: float = 0.0
    """For `scope: global`; 0: no limit."""


class Selection(NamedTuple):
    """The samples of this rank's batch that the descent uses."""

    index_D: Tensor | slice
    """Positions in the batch, ascending; then, as padding that does not count, the same again from the first."""
    mean_over_ranks: Callable[[Tensor], Tensor]
    """From their losses [D] to a scalar, whose average over ranks is the mean over all ranks' kept samples."""
    num_kept: Tensor
    """Their number without the padding, a scalar on the device."""
    threshold: Tensor
    """The smallest score kept among all samples that competed; nan where nothing was selected."""


def keep_all(loss_B: Tensor) -> Selection:
    """Every sample: no selection, no copy of the images."""
    nan = torch.full_like(loss_B[0], torch.nan)
    return Selection(slice(None), Tensor.mean, torch.full_like(nan, len(loss_B)), nan)


class Choice:
    """One selection: begun when this rank's scores are known, ended when the samples are needed.

    What ranks exchange travels in between, while this rank computes.
    """

    def __init__(self, sds: Sds, num_samples: int, ranks: Ranks) -> None:
        self._sds, self._ranks, self._num_samples = sds, ranks, num_samples
        self._capacity = None
        if sds.scope == "global" and sds.capacity_factor > 0.0:
            self._capacity = selection.capacity(sds.gamma, num_samples, sds.capacity_factor)
        self._score_B: Tensor | None = None
        self._gathered: Pending | None = None
        self.head: Head | None = None
        """The classifier, for `score: head`."""

    @property
    def num_within_rank(self) -> int:
        """How many a selection within the rank keeps."""
        return selection.num_kept(self._sds.gamma, self._num_samples)

    @property
    def is_begun(self) -> bool:
        """Whether the scores are known."""
        return self._score_B is not None

    @property
    def keeps_all(self) -> bool:
        """Whether there is nothing to select."""
        return self._sds.gamma >= 1.0

    def begin(self, score_B: Tensor) -> None:
        """Take this rank's scores, and send what the other ranks need of them."""
        self._score_B = score_B
        if self._sds.scope == "rank":
            return
        sent = score_B
        if self._sds.transport == "thresholds":
            sent = selection.quantiles(score_B, self._sds.num_quantiles, self._capacity)
        self._gathered = self._ranks.gather_later(sent)

    def see(self, outputs: Any, loss_B: Tensor) -> None:
        """Begin now, if the score follows from the pass at the unperturbed weights; `loss_B` still has its graph."""
        if self.head is not None:
            self.begin(self.head.rise(outputs, loss_B))
        elif self._sds.score == "loss":
            self.begin(loss_B.detach())

    def split(self) -> tuple[Tensor, Tensor]:
        """A selection within the rank as two lists of positions: those kept, and the rest."""
        order_B = _kept_first(selection.select(self._scores.unsqueeze(0), self._sds.gamma)[0])
        return order_B[: self.num_within_rank], order_B[self.num_within_rank :]

    def end(self) -> Selection:
        """The samples that this rank keeps."""
        if self._gathered is None:
            return self._within_rank()
        if self._sds.transport == "scores":
            return self._by_scores(self._gathered.wait())
        return self._by_threshold(self._gathered.wait())

    @property
    def _scores(self) -> Tensor:
        assert self._score_B is not None
        return self._score_B

    def _within_rank(self) -> Selection:
        kept_B = selection.select(self._scores.unsqueeze(0), self._sds.gamma)[0]
        # The count is known, so the host does not wait for the device. A lone sample goes twice: the mean is the same.
        index_D = _kept_first(kept_B)[: self.num_within_rank]
        index_D = index_D.repeat(2) if len(index_D) < self._smallest else index_D
        num_kept = torch.full_like(self._scores[0], self.num_within_rank)
        return Selection(index_D, Tensor.mean, num_kept, selection.threshold(self._scores, kept_B))

    def _by_scores(self, score_WB: Tensor) -> Selection:
        """Every rank sees every score, so all come to the same exact answer, and know how many samples that keeps."""
        W, gamma = len(score_WB), self._sds.gamma
        kept_WB = selection.select(score_WB, gamma, self._capacity)
        most = None if self._capacity is None else W * self._capacity
        total = selection.num_kept(gamma, score_WB.numel(), at_least=W, at_most=most)
        return self._selection(kept_WB[self._ranks.rank], lambda: total, selection.threshold(score_WB, kept_WB))

    def _by_threshold(self, quantiles_WQ: Tensor) -> Selection:
        """Every rank derives the same threshold; how many samples that keeps is summed behind the descent's forward."""
        gamma = self._sds.gamma
        threshold = selection.shared_threshold(quantiles_WQ, gamma, self._num_samples, self._capacity)
        kept_B = selection.select_above(self._scores, threshold, self._capacity)
        total = self._ranks.sum_later(kept_B.sum().float())
        return self._selection(kept_B, total.wait, threshold)

    def _selection(self, kept_B: Tensor, total: Callable[[], Tensor | int], threshold: Tensor) -> Selection:
        W, num_kept = self._ranks.world_size, kept_B.sum()
        # Without a capacity the batch's size is the count: the one place of a step where the host waits for the device.
        size = int(num_kept) if self._capacity is None else self._capacity
        index_D = _filled(kept_B, max(size, self._smallest))
        counts_D = torch.arange(len(index_D), device=kept_B.device) < num_kept
        return Selection(
            index_D, lambda loss_D: torch.where(counts_D, loss_D, 0.0).sum() * W / total(), num_kept.float(), threshold
        )

    @property
    def _smallest(self) -> int:
        """BatchNorm refuses a batch of one where its maps are a single pixel."""
        return min(2, self._num_samples)


def _kept_first(kept_B: Tensor) -> Tensor:
    """All positions, those of the kept samples first, in ascending order each."""
    return kept_B.byte().argsort(descending=True, stable=True)


def _filled(kept_B: Tensor, size: int) -> Tensor:
    """`size` positions: those of the kept samples (there is at least one), and the same again from the first.

    So padding shows BatchNorm only samples that are kept anyway, and brings in no number that is not finite.
    """
    place = torch.arange(size, device=kept_B.device)
    return _kept_first(kept_B)[place % kept_B.sum()]
