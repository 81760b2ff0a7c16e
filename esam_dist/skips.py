"""Updates that were skipped because their gradient was not finite: how many in a row, and what began it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from esam_dist.progress import Progress

FEW = 3
"""So many samples are named in a line."""


@dataclass(frozen=True)
class Begin:
    """The first skipped update of a series."""

    step: int
    start: int
    """Position of its first sample in the run."""
    samples: int
    """How many it has, over all ranks."""
    ranks: list[int] = field(default_factory=list)
    """On which a loss was not finite; none where only a gradient was not."""

    def __str__(self) -> str:
        """In words."""
        return f"step {self.step} (samples {self.start} to {self.start + self.samples - 1} of the run), {self._cause()}"

    def _cause(self) -> str:
        if not self.ranks:
            return "where the losses of all ranks were finite, so that a gradient overflowed"
        return f"where the loss of rank {self.ranks[0]} was not finite" + (
            f", and that of {len(self.ranks) - 1} others" if len(self.ranks) > 1 else ""
        )


@dataclass
class Skips:
    """The skipped updates of a run, taken note of once per log interval."""

    progress: Progress
    limit: int
    """Updates in a row that may be skipped (`train.max_skipped_updates`)."""
    begin: Begin | None = None
    """Where the series under way began, as far as this process has seen it."""
    excess: str | None = None
    """Which series was too long, in words; None: none was."""

    def note(self, skipped: Sequence[float], not_finite_WU: Sequence[Sequence[float]], samples_per_step: int) -> None:
        """Take note of the latest updates, U: which were skipped, and on which of the W ranks a loss was not finite."""
        for place, was_skipped in enumerate(skipped):
            if self.excess is not None:
                return
            if not was_skipped:
                self.progress.skipped_in_a_row, self.begin = 0, None
                continue
            self.progress.skipped_in_a_row += 1
            back = len(skipped) - 1 - place
            step, end = self.progress.step - back, self.progress.samples - back * samples_per_step
            if self.begin is None:
                ranks = [rank for rank, of_rank in enumerate(not_finite_WU) if of_rank[place]]
                self.begin = Begin(step, end - samples_per_step, samples_per_step, ranks)
            if self.progress.skipped_in_a_row > self.limit:
                self.excess = (
                    f"{self.progress.skipped_in_a_row} updates in a row until step {step} had a gradient that is not "
                    f"finite (train.max_skipped_updates = {self.limit}), the first at {self.begin}"
                )


def named(keys_W: Sequence[Sequence[str]], ranks: Sequence[int]) -> str:
    """The samples that each of the W ranks gave, in a few words: those of the first of `ranks`, or all ranks'."""
    rank = ranks[0] if ranks else 0
    keys = keys_W[rank]
    more = sum(map(len, keys_W)) - len(keys[:FEW])
    if not keys:
        return "; which samples that rank had is not known any more"
    return f"; rank {rank} had {', '.join(keys[:FEW])}" + (f" and {more} more samples" if more else "")
