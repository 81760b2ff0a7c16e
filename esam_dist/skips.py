"""Updates that were skipped because their gradient was not finite: how many in a row, and what began it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esam_dist.progress import Progress


@dataclass
class Skips:
    """The skipped updates of a run, taken note of once per log interval."""

    progress: Progress
    limit: int
    """Updates in a row that may be skipped (`train.max_skipped_updates`)."""
    _begin: str = ""
    """What began the series under way, as far as this process has seen it."""
    excess: str | None = None
    """Which series was too long, in words; None: none was."""

    def note(self, skipped: Sequence[float], not_finite_WU: Sequence[Sequence[float]], samples_per_step: int) -> None:
        """Take note of the latest updates, U: which were skipped, and on which of the W ranks a loss was not finite."""
        for place, was_skipped in enumerate(skipped):
            if not was_skipped:
                self.progress.skipped_in_a_row, self._begin = 0, ""
                continue
            self.progress.skipped_in_a_row += 1
            back = len(skipped) - 1 - place
            step, end = self.progress.step - back, self.progress.samples - back * samples_per_step
            if not self._begin:
                ranks = [rank for rank, of_rank in enumerate(not_finite_WU) if of_rank[place]]
                self._begin = f"step {step} (samples {end - samples_per_step} to {end - 1} of the run), {_cause(ranks)}"
            if self.progress.skipped_in_a_row > self.limit and self.excess is None:
                self.excess = (
                    f"{self.progress.skipped_in_a_row} updates in a row until step {step} had a gradient that is not "
                    f"finite (train.max_skipped_updates = {self.limit}), the first at {self._begin}"
                )


def _cause(ranks: list[int]) -> str:
    if not ranks:
        return "where the losses of all ranks were finite, so that a gradient overflowed"
    return f"where the loss of rank {ranks[0]} was not finite" + (
        f", and that of {len(ranks) - 1} others" if len(ranks) > 1 else ""
    )
