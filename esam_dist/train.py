"""The training loop."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from esam_dist import config
from esam_dist.agreement import Agreement
from esam_dist.data import Batch
from esam_dist.errors import LossNotFiniteError
from esam_dist.metrics import TrainRow
from esam_dist.progress import Progress
from esam_dist.saving import Saver
from esam_dist.schedule import LearningRate
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment, StepStats
from esam_dist.training import Training
from esam_dist.validation import Ahead, validate
from esam_dist.window import Window

__all__ = ["Training", "final_step", "learning_rate_at", "micro_batch", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each sample, [B], from logits [B, K] and classes [B] or shares of classes [B, K]."""

    label_smoothing: float

    def __call__(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        return F.cross_entropy(logits_BK, labels, reduction="none", label_smoothing=self.label_smoothing)


def train(run: Training) -> bool:
    """Train until the configuration's end, moving `run.progress` along; True when it was reached, False when stopped.

    A stop is agreed on by all ranks after an update or within a validation, and leaves a checkpoint.
    An update whose gradient is not finite is skipped. Raises LossNotFiniteError for too many in a row, or for a loss
    that is not finite in an update that was made: before the next checkpoint, so that the last one is sound.
    """
    cfg, trainer, progress, num_samples = run.cfg, run.trainer, run.progress, run.data.num_samples
    last_step = final_step(cfg, progress, num_samples, samples_per_step(cfg, trainer))
    if progress.step >= last_step and trainer.ranks.is_first:
        logger.info("step %d was the last: nothing is left to do; for more, raise train.epochs", progress.step)
    batches = Ahead(run.data.batches(progress.samples))
    with Saver(run) as saver:
        if progress.validation_is_missing and not _validate(run, saver, batches, is_last=progress.step >= last_step):
            return False
        finished = _updates(run, saver, batches, last_step)
    if finished and trainer.ranks.is_first and progress.step:
        sharp = progress.sharp_updates
        logger.info("%d of %d updates were sharpness-aware (%.0f%%)", sharp, progress.step, 100 * sharp / progress.step)
    return finished


def _updates(run: Training, saver: Saver, batches: Ahead, last_step: int) -> bool:
    """All updates up to `last_step`; False when all ranks agreed to stop before that was saved."""
    cfg, trainer, progress, num_samples = run.cfg, run.trainer, run.progress, run.data.num_samples
    num_new = samples_per_step(cfg, trainer)
    window = Window(cfg, trainer, run.data, progress)
    agreement = Agreement(trainer.ranks, run.stop_requested)
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
        progress.samples += num_new
        progress.sharp_updates += cfg.method.is_sharp(moment)
        if run.average is not None:
            run.average.update(progress.step)
        run.metrics.progress(progress.step)
        saver.hear(agreement.round(saver.news))
        run.has_begun()

        begun, ended = ((progress.samples - back) // num_samples for back in (num_new, 0))
        is_last, stops = progress.step == last_step, agreement.stops
        every = cfg.checkpoint.every_steps
        saves = is_last or stops or saver.is_due or (progress.step % every == 0 if every else ended > begun)
        validates = is_last or is_passed(cfg.train.validate_every, begun, ended)
        if progress.step % cfg.train.log_every == 0 or saves or validates:
            row = window.close(moment, lr)
            run.metrics.train(row)
            _check_finite(run, row, window, saver)
        progress.validation_is_missing = validates
        if validates and not stops:
            if not _validate(run, saver, batches, is_last=is_last):
                return False
        elif saves:
            saver.save(None, is_last=is_last and not stops, waits=is_last or stops)
        if saves or validates:
            window.restart()
        if stops:
            return False
    return True


def _validate(run: Training, saver: Saver, batches: Ahead, *, is_last: bool) -> bool:
    """Validate, and save with the result; False when all ranks agreed to stop instead."""
    accuracy = validate(run, batches)
    run.progress.validation_is_missing = accuracy is None
    stops = accuracy is None
    saver.save(accuracy, is_last=is_last and not stops, waits=is_last or stops)
    return not stops


def samples_per_step(cfg: config.Config, trainer: SharpnessAware) -> int:
    """What all ranks together see in one update."""
    return cfg.data.batch_size * trainer.ranks.world_size * cfg.train.accumulate


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


def _check_finite(run: Training, row: TrainRow, window: Window, saver: Saver) -> None:
    if not window.is_lost and window.skips.excess is None:
        return
    run.metrics.not_finite()
    cause = window.skips.excess or f"the training loss is not finite at step {row.step}"
    raise LossNotFiniteError(
        f"{cause}: lower optim.lr (now {row.lr:.3g}) or method.rho (now {row.rho:.3g}); {saver.way_back()}"
    )
