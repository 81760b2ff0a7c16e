"""Validation in the middle of a run: of the weights, and of their average; a stop ends it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from esam_dist.agreement import Agreement, Stopped
from esam_dist.averaging import WeightAverage, recompute_batchnorm
from esam_dist.data import Batch
from esam_dist.evaluate import Evaluation, evaluate
from esam_dist.metrics import ValidationRow
from esam_dist.training import Training
from esam_dist.window import newly


class Ahead(Iterator[Batch]):
    """Batches in order, of which the next ones may be looked at before it is their turn."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._waiting: deque[Batch] = deque()

    def __next__(self) -> Batch:
        return self._waiting.popleft() if self._waiting else next(self._batches)

    def peek(self, count: int) -> Iterator[Batch]:
        """The next `count`, which stay the next; they are held until then."""
        for place in range(count):
            if place == len(self._waiting):
                self._waiting.append(next(self._batches))
            yield self._waiting[place]


def validate(run: Training, batches: Ahead) -> float | None:
    """The accuracy of the weights, reported with all else; None: all ranks have agreed to stop, and it is unfinished.

    `batches`: those that are trained on next.
    """
    agreement = Agreement(run.trainer.ranks, run.stop_requested)
    start, skipped = time.perf_counter(), dict(run.validation.skipped)
    try:
        raw = _evaluate(run, agreement)
        averaged = None if run.average is None else _evaluate_average(run, run.average, batches, agreement)
    except Stopped:
        return None
    run.metrics.validation(
        ValidationRow(
            step=run.progress.step,
            epoch=run.progress.samples / run.data.num_samples,
            accuracy=raw.accuracy,
            top5_accuracy=raw.top5_accuracy,
            loss=raw.loss,
            seconds=time.perf_counter() - start,
            averaged_accuracy=averaged.accuracy if averaged else None,
            averaged_loss=averaged.loss if averaged else None,
            skipped_samples=newly(run.validation.skipped, skipped),
        )
    )
    return raw.accuracy


def _evaluate(run: Training, agreement: Agreement) -> Evaluation:
    def through(batches: Iterator[Batch]) -> Iterator[Batch]:
        made = 0
        for batch in batches:
            yield batch
            made += 1
            run.metrics.heartbeat()
            agreement.round_or_stop()
        # Another rank's share may be larger, or this one has lost samples that cannot be read.
        for _ in range(made, run.validation.most_batches):
            agreement.round_or_stop()

    engine = run.trainer.engine
    return evaluate(engine.module, run.validation, run.trainer.ranks, in_step=engine.calls_together, through=through)


def _evaluate_average(run: Training, average: WeightAverage, batches: Ahead, agreement: Agreement) -> Evaluation:
    """The averaged weights, with BatchNorm's statistics of the batches that are trained on next."""

    def images() -> Iterator[Tensor]:
        for batch in batches.peek(run.cfg.train.average_batches):
            yield batch.images
            run.metrics.heartbeat()
            agreement.round_or_stop()

    module = run.trainer.engine.module
    with average.averaged(module):
        recompute_batchnorm(module, images(), run.trainer.ranks)
        average.note_statistics(module)
        return _evaluate(run, agreement)
