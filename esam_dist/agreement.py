"""What all ranks learn alike in the middle of their work: whether one of them wants to stop, and what rank 0 tells.

A sum over ranks of a few numbers in host memory: no wait for a GPU. It makes the hosts wait for each other, so it is
not made in every round (an update, a batch of validation), but about every EVERY_SECONDS, and in every round that takes
longer. When the next one is due follows from rank 0's clock, which it tells with each, so that all ranks know it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from esam_dist.ranks import CPU, Ranks

EVERY_SECONDS = 0.1
MOST_ROUNDS = 1000


class Stopped(Exception):  # noqa: N818  # no error, but an agreed end
    """All ranks have agreed to stop, and leave what they are at."""


class Agreement:
    """The ranks' common knowledge, round by round; all ranks make the same rounds."""

    def __init__(self, ranks: Ranks, stop_requested: Callable[[], bool]) -> None:
        self._ranks, self._stop_requested = ranks, stop_requested
        self._left, self._rounds = 1, 1
        self._since = time.monotonic()
        self.stops = False
        """Whether all ranks know that one of them wants to stop."""

    def round(self, told: Callable[[], Sequence[float]] = tuple) -> list[float] | None:
        """End a round; where it is time, what `told()` returned on rank 0, alike on all ranks, else None.

        `told()` has the same length on all ranks.
        """
        self._left -= 1
        if self._left > 0:
            return None
        told_here = list(told())
        mine = [time.monotonic() - self._since, *told_here] if self._ranks.is_first else [0.0] * (1 + len(told_here))
        numbers = torch.tensor([float(self._stop_requested()), *mine], dtype=torch.float64, device=CPU)
        stops, seconds, *heard = self._ranks.sum_(numbers).tolist()
        self.stops = self.stops or stops > 0.0
        # Were they as long as the last ones.
        fitting = int(EVERY_SECONDS * self._rounds / seconds) if seconds > 0.0 else MOST_ROUNDS
        self._left = self._rounds = min(max(1, fitting), MOST_ROUNDS)
        self._since = time.monotonic()
        return heard

    def round_or_stop(self) -> None:
        """End a round. Raises Stopped, on all ranks, when one of them wants to stop."""
        self.round()
        if self.stops:
            raise Stopped
