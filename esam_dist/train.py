"""The training loop, and all that it carries from one update to the next."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from esam_dist import config
from esam_dist.averaging import WeightAverage, recompute_batchnorm
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import Batch, TrainData, ValidationData
from esam_dist.errors import CheckpointNotWrittenError, LossNotFiniteError, UserError
from esam_dist.evaluate import Evaluation, evaluate
from esam_dist.fingerprint import Replicas
from esam_dist.metrics import Metrics, TrainRow, ValidationRow
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from esam_dist.schedule import LearningRate
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment, StepStats
from esam_dist.window import Window, newly

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """The parts of a run, put together by `cli`."""

    cfg: config.Config
    trainer: SharpnessAware
    data: TrainData
    validation: ValidationData
    metrics: Metrics
    checkpoints: Checkpoints
    progress: Progress
    stop_requested: Callable[[], bool]
    average: WeightAverage | None = None
    """Of the weights, validated beside them."""
    replicas: Replicas = field(default_factory=lambda: Replicas(Ranks(), 0))
    """Compares them over ranks."""


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each sample, [B], from logits [B, K] and classes [B] or shares of classes [B, K]."""

    label_smoothing: float

    def __call__(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        return F.cross_entropy(logits_BK, labels, reduction="none", label_smoothing=self.label_smoothing)


def train(run: Training) -> bool:
    """Train until the configuration's end, moving `run.progress` along; True when it was reached, False when stopped.

    A stop is agreed on by all ranks when metrics are due, and leaves a checkpoint.
    An update whose gradient is not finite is skipped. Raises LossNotFiniteError for too many in a row, or for a loss
    that is not finite in an update that was made, and ReplicasDifferError where a rank holds other weights than the
    others: before the next checkpoint, so that the last one is sound.
    """
    cfg, trainer, progress, num_samples = run.cfg, run.trainer, run.progress, run.data.num_samples
    samples_per_step = cfg.data.batch_size * trainer.ranks.world_size * cfg.train.accumulate
    last_step = final_step(cfg, progress, num_samples, samples_per_step)
    if progress.step >= last_step and trainer.ranks.is_first:
        logger.info("step %d was the last: nothing is left to do; for more, raise train.epochs", progress.step)
    batches = Ahead(run.data.batches(progress.samples))
    window = Window(cfg, trainer, run.data, progress, run.stop_requested)
    trainer.engine.module.train()
    while progress.step < last_step:
        epoch = progress.samples / num_samples
        moment, lr = Moment(progress.step, epoch, epoch / cfg.train.epochs), learning_rate_at(epoch, cfg)
        for _ in range(cfg.train.accumulate):
            trainer.clock.start()
            batch = next(batches)
            trainer.clock.end("data")
            window.add(micro_batch(trainer, batch, cfg, moment, lr))
        progress.step += 1
        progress.samples += samples_per_step
        progress.sharp_updates += cfg.method.is_sharp(moment)
        if run.average is not None:
            run.average.update(progress.step)
        run.metrics.progress(progress.step)

        begun, ended = ((progress.samples - back) // num_samples for back in (samples_per_step, 0))
        is_last = progress.step == last_step
        every = cfg.checkpoint.every_steps
        saves = is_last or (progress.step % every == 0 if every else ended > begun)
        validates = is_last or is_passed(cfg.train.validate_every, begun, ended)
        stops = False
        if progress.step % cfg.train.log_every == 0 or saves or validates:
            run.replicas.begin(trainer.engine.replicated(), progress.step)
            row, stops = window.close(moment, lr)
            run.metrics.train(row)
            _check_finite(run, row, window)
            _check_alike(run)
        accuracy = _validate(run, batches) if validates else None
        if saves or stops or validates:
            _save(run, accuracy, is_last=is_last)
            window.restart()
        if stops:
            return is_last
    if trainer.ranks.is_first and progress.step:
        sharp = progress.sharp_updates
        logger.info("%d of %d updates were sharpness-aware (%.0f%%)", sharp, progress.step, 100 * sharp / progress.step)
    return True


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


def micro_batch(trainer: SharpnessAware, batch: Batch, cfg: config.Config, moment: Moment, lr: float) -> StepStats:
    """One micro-batch of images, as the configuration has it."""
    loss = CrossEntropy(cfg.train.label_smoothing)
    return trainer.step(batch.images, batch.labels, loss, moment=moment, lr=lr)


def final_step(cfg: config.Config, progress: Progress, num_samples: int, samples_per_step: int) -> int:
    """The update that ends the run: the first that completes the epochs, or `train.max_steps` if that is sooner."""
    remaining = max(0, cfg.train.epochs * num_samples - progress.samples)
    last_step = progress.step + math.ceil(remaining / samples_per_step)
    return min(last_step, cfg.train.max_steps) if cfg.train.max_steps else last_step


def is_passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies between the two counts, of which `now` may be several more than `before`."""
    return now // every > before // every


def learning_rate_at(epoch: float, cfg: config.Config) -> float:
    """The rate of the update that begins at `epoch`."""
    optim = cfg.optim
    rate = LearningRate(
        optim.lr, cfg.train.epochs, optim.schedule, optim.warmup_epochs, optim.step_epochs, optim.step_factor
    )
    return rate(epoch)


def _check_finite(run: Training, row: TrainRow, window: Window) -> None:
    if not window.is_lost and window.skips.excess is None:
        return
    run.metrics.not_finite()
    cause = window.skips.excess or f"the training loss is not finite at step {row.step}"
    raise LossNotFiniteError(
        f"{cause}: lower optim.lr (now {row.lr:.3g}) or method.rho (now {row.rho:.3g}); {run.checkpoints.way_back()}"
    )


def _check_alike(run: Training) -> None:
    newest = run.checkpoints.newest_name()
    run.replicas.end(
        run.progress.step,
        "there is no checkpoint to go back to; start again on other devices"
        if newest == "none"
        else f"started again, on other devices, the run goes on from {newest}, the last sound checkpoint",
    )


def _validate(run: Training, batches: Ahead) -> float:
    start, skipped = time.perf_counter(), dict(run.validation.skipped)
    raw = _evaluate(run)
    averaged = None if run.average is None else _evaluate_average(run, run.average, batches)
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


def _evaluate(run: Training) -> Evaluation:
    engine = run.trainer.engine
    return evaluate(
        engine.module, run.validation, run.trainer.ranks, in_step=engine.calls_together, beat=run.metrics.heartbeat
    )


def _evaluate_average(run: Training, average: WeightAverage, batches: Ahead) -> Evaluation:
    """The averaged weights, with BatchNorm's statistics of the batches that are trained on next."""
    module = run.trainer.engine.module
    images = (batch.images for batch in batches.peek(run.cfg.train.average_batches))
    with average.averaged(module):
        recompute_batchnorm(module, images, run.trainer.ranks)
        average.note_statistics(module)
        return _evaluate(run)


def _save(run: Training, accuracy: float | None, *, is_last: bool) -> None:
    """Write a checkpoint. One that the disk refuses ends the run only where it was to be the last."""
    start, step, ranks = time.perf_counter(), run.progress.step, run.trainer.ranks
    run.replicas.begin(run.trainer.engine.replicated(), step, saves=True)
    _check_alike(run)
    engine_state = run.trainer.engine.state_dict()
    failure: UserError | None = None
    if ranks.is_first:
        whole = {"engine": engine_state, "train": run.progress.saved(), "method": run.trainer.state.state_dict()}
        if run.average is not None:
            whole["average"] = run.average.state_dict()
        try:
            run.checkpoints.save(whole, step, accuracy)
        except UserError as error:
            failure = error
    # Told to all, so that all end, or all go on.
    failure = ranks.share(failure)
    if isinstance(failure, CheckpointNotWrittenError):
        run.metrics.checkpoint_failed(step)
        if not is_last:
            if ranks.is_first:
                logger.error("%s; tried again at the next", failure)
            return
    if failure is not None:
        raise failure
    run.metrics.checkpoint_saved(step, time.perf_counter() - start)
