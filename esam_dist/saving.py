"""When a run saves, and what all ranks learn of it: rank 0 writes, behind training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from esam_dist.checkpoint import Outcome, Writer
from esam_dist.errors import CheckpointNotWrittenError
from esam_dist.training import Training

logger = logging.getLogger(__name__)

NOTHING, WRITTEN, REFUSED, FATAL = range(4)


class Saver:
    """The checkpoints of a run under way, from one `with` to its end; all ranks call it alike.

    How a checkpoint ended is known to rank 0 first; the others hear it with `news`, which travels in an `Agreement`.
    When the block ends, nothing is being written any more. After Ctrl-C what is under way is given up.
    """

    def __init__(self, run: Training) -> None:
        self._run, self._ranks = run, run.trainer.ranks
        self._writer = Writer(run.checkpoints)
        self._told: Outcome | None = None
        self._begun = time.monotonic()
        self.is_due = False
        """Whether `checkpoint.every_minutes` have passed."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._writer.give_up()
        self._writer.wait()
        while (outcome := self._writer.next_ended()) is not None:
            # Nobody else hears of it: the run ends by an error of its own.
            if outcome.error is not None:
                logger.error("%s", outcome.error)

    def save(self, accuracy: float | None, *, is_last: bool, waits: bool) -> None:
        """Begin to write a checkpoint of this moment; where it `waits`, or nothing is to be written behind training,
        return when that is done.

        One that the disk refuses ends the run only where it was to be the last (`is_last`).
        """
        start, step = time.perf_counter(), self._run.progress.step
        if self._ranks.is_first:
            # Before the copy, so that there is only one.
            self._writer.wait()
        self._run.replicas.begin(self._run.trainer.engine.replicated(), step, saves=True)
        self.check_alike()
        state = self._snapshot()
        if self._ranks.is_first:
            self._writer.begin(state, step, accuracy)
        del state
        self._begun, self.is_due = time.monotonic(), False
        if waits or not self._run.cfg.checkpoint.asynchronous:
            self._settle(step if is_last else None)
        self._run.metrics.checkpoint_begun(time.perf_counter() - start)

    def news(self) -> Sequence[float]:
        """On rank 0: how a checkpoint has ended that the other ranks do not know of, and whether one is due."""
        if not self._ranks.is_first:
            return (0.0, 0.0, 0.0, 0.0)
        minutes = self._run.cfg.checkpoint.every_minutes
        due = float(0.0 < minutes <= (time.monotonic() - self._begun) / 60.0)
        self._told = self._writer.next_ended()
        if self._told is None:
            return (NOTHING, 0.0, 0.0, due)
        return (_kind(self._told), self._told.step, self._told.seconds, due)

    def hear(self, news: Sequence[float] | None) -> None:
        """What rank 0 told in `news`, if anything. Raises, on all ranks, where the run cannot go on."""
        if news is None:
            return
        kind, step, seconds, due = news
        self.is_due = bool(due)
        if kind == NOTHING:
            return
        outcome = Outcome(int(step), seconds)
        if kind != WRITTEN:
            outcome = self._ranks.share(self._told)
        self._report(outcome, None)

    def check_alike(self) -> None:
        """End a comparison of the replicas, where one was begun. Raises ReplicasDifferError, on all ranks."""
        self._run.replicas.end(self._run.progress.step, self._on_other_devices)

    def _on_other_devices(self) -> str:
        newest = self._run.checkpoints.newest_name()
        if newest == "none":
            return "there is no checkpoint to go back to; start again on other devices"
        return f"started again, on other devices, the run goes on from {newest}, the last sound checkpoint"

    def way_back(self) -> str:
        """See `Checkpoints`; what is being written counts."""
        self._writer.wait()
        return self._run.checkpoints.way_back()

    def _settle(self, last_step: int | None) -> None:
        """Wait until all is written, and tell it to all ranks."""
        outcomes: list[Outcome] = []
        if self._ranks.is_first:
            self._writer.wait()
            while (outcome := self._writer.next_ended()) is not None:
                outcomes.append(outcome)
        for outcome in self._ranks.share(outcomes):
            self._report(outcome, last_step)

    def _report(self, outcome: Outcome, last_step: int | None) -> None:
        if outcome.error is None:
            self._run.metrics.checkpoint_saved(outcome.step, outcome.seconds)
            return
        if isinstance(outcome.error, CheckpointNotWrittenError):
            self._run.metrics.checkpoint_failed(outcome.step)
            if outcome.step != last_step:
                if self._ranks.is_first:
                    logger.error("%s; tried again at the next", outcome.error)
                return
        raise outcome.error

    def _snapshot(self) -> dict[str, Any]:
        """Copies of all that a run goes on from, in the memory of rank 0's host."""
        run, keeps = self._run, self._ranks.is_first
        engine = run.trainer.engine.state_dict(keep=keeps)
        if not keeps:
            return {}
        state = {"engine": engine, "train": run.progress.saved(), "method": run.trainer.state.state_dict()}
        if run.average is not None:
            state["average"] = run.average.state_dict()
        return state | ({"card": run.card} if run.card else {})


def _kind(outcome: Outcome) -> int:
    if outcome.error is None:
        return WRITTEN
    return REFUSED if isinstance(outcome.error, CheckpointNotWrittenError) else FATAL
