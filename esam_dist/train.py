"""The training loop, and all that it carries from one update to the next."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from esam_dist import config
from esam_dist.batchnorm import GroupStatistics
from esam_dist.checkpoint import Checkpoints
from esam_dist.clock import PhaseClock
from esam_dist.data import Batch, TrainData, ValidationData
from esam_dist.engine import Engine
from esam_dist.engine.zero3 import Zero3Engine
from esam_dist.errors import CheckpointNotWrittenError, LossNotFiniteError, UserError
from esam_dist.esam import Memory, StepStats, esam_step
from esam_dist.evaluate import evaluate
from esam_dist.metrics import Metrics, TrainRow, ValidationRow
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule
from esam_dist.schedule import learning_rate
from esam_dist.synchronised import synchronised_step

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands; with the engine's state, all that a checkpoint holds.

    Nothing random is among it: data order, augmentation, perturbed weights and dropout are functions of these numbers.
    """

    step: int = 0
    """Updates made."""
    samples_seen: int = 0
    """Position in the global sequence of samples, over all ranks."""


def train(
    engine: Engine,
    data: TrainData,
    validation: ValidationData,
    cfg: config.Config,
    ranks: Ranks,
    metrics: Metrics,
    checkpoints: Checkpoints,
    state: TrainState,
    memory: Memory,
    stop_requested: Callable[[], bool],
) -> bool:
    """Train until the configuration's end, moving `state` along; True when it was reached, False when stopped.

    A stop is agreed on by all ranks when metrics are due, and leaves a checkpoint.
    Raises LossNotFiniteError before the next checkpoint, so that the last one is sound.
    """
    samples_per_step = cfg.data.batch_size * ranks.world_size * cfg.train.accumulate
    last_step = final_step(cfg, state, data.num_samples, samples_per_step)
    if state.step >= last_step and ranks.is_first:
        logger.info("step %d was the last: nothing is left to do; for more, raise train.epochs", state.step)
    batches = data.batches(state.samples_seen)
    clock = PhaseClock(ranks.device)
    window = Window(ranks, data, state)
    engine.module.train()
    while state.step < last_step:
        epoch = state.samples_seen / data.num_samples
        rule = Rule.at(cfg, step=state.step, epoch=epoch)
        lr = learning_rate_at(epoch, cfg)
        for micro in range(cfg.train.accumulate):
            clock.start()
            batch = next(batches)
            clock.end("data")
            seed = (cfg.run.seed, state.step, micro)
            for stats in micro_batch(
                engine, batch, rule, cfg.method.group_size, lr=lr, ranks=ranks, seed=seed, clock=clock, memory=memory
            ):
                window.add(stats)
        ranks.average_buffers(engine.module)
        state.step += 1
        state.samples_seen += samples_per_step
        metrics.progress(state.step)

        ends_epoch = state.samples_seen // data.num_samples > int(epoch)
        is_last = state.step == last_step
        saves = is_last or (state.step % cfg.checkpoint.every_steps == 0 if cfg.checkpoint.every_steps else ends_epoch)
        validates = is_last or (ends_epoch and int(epoch + 1) % cfg.train.validate_every == 0)
        stops = False
        if state.step % cfg.train.log_every == 0 or saves or validates:
            row, stops = window.close(clock, rule, lr, stop_requested())
            metrics.train(row)
            _check_finite(row, checkpoints)
        accuracy = None
        if validates:
            accuracy = _validate(engine, validation, ranks, metrics, state, data.num_samples)
            window.restart()
        if saves or stops or validates:
            _save(engine, state, memory, ranks, metrics, checkpoints, accuracy, is_last=is_last)
            window.restart()
        if stops:
            return is_last
    return True


def micro_batch(
    engine: Engine,
    batch: Batch,
    rule: Rule,
    group_size: int,
    *,
    lr: float,
    ranks: Ranks,
    seed: tuple[int, ...],
    clock: PhaseClock,
    memory: Memory,
) -> Iterator[StepStats]:
    """One step for each group of `group_size` samples (0: the batch is the group), as if each had a rank of its own."""
    size = group_size or len(batch.labels)
    num_groups = len(batch.labels) // size
    statistics = GroupStatistics(engine.module) if num_groups > 1 else None
    for group, start in enumerate(range(0, len(batch.labels), size)):
        part = Batch(batch.images[start : start + size], batch.labels[start : start + size])
        names = (*seed, ranks.rank * num_groups + group)
        if isinstance(engine, Zero3Engine) and not rule.is_plain:
            yield synchronised_step(engine, part, rule, lr=lr, ranks=ranks, seed=names, clock=clock)
        else:
            yield esam_step(engine, part, rule, lr=lr, ranks=ranks, seed=names, clock=clock, memory=memory)
        if statistics:
            statistics.end_group()
    if statistics:
        statistics.finish()


def final_step(cfg: config.Config, state: TrainState, num_samples: int, samples_per_step: int) -> int:
    """The update that ends the run: the first that completes the epochs, or `train.max_steps` if that is sooner."""
    remaining = max(0, cfg.train.epochs * num_samples - state.samples_seen)
    last_step = state.step + math.ceil(remaining / samples_per_step)
    return min(last_step, cfg.train.max_steps) if cfg.train.max_steps else last_step


def learning_rate_at(epoch: float, cfg: config.Config) -> float:
    """The rate of the update that begins at `epoch`."""
    optim = cfg.optim
    return learning_rate(
        epoch,
        peak=optim.lr,
        epochs=cfg.train.epochs,
        schedule=optim.schedule,
        warmup_epochs=optim.warmup_epochs,
        step_epochs=optim.step_epochs,
        step_factor=optim.step_factor,
    )


class Window:
    """What happened since the last row of metrics; it stays on the device until `close`."""

    def __init__(self, ranks: Ranks, data: TrainData, state: TrainState) -> None:
        self._ranks, self._data, self._state = ranks, data, state
        self._stats: list[torch.Tensor] = []
        self._skipped_samples = dict(data.skipped)
        self._start_step, self._start_samples = state.step, state.samples_seen
        self.restart()

    def restart(self) -> None:
        """Leave the time until now (validation, checkpoint) out of the throughput."""
        self._start_time = time.perf_counter()

    def add(self, stats: StepStats) -> None:
        """Take note of one micro-batch."""
        self._stats.append(torch.stack([*stats]))

    def close(self, clock: PhaseClock, rule: Rule, lr: float, stop: bool) -> tuple[TrainRow, bool]:
        """The row of this window, alike on all ranks but for phases, and whether any rank wants to stop.

        The one place of the loop where the host waits for the device and for the other ranks.
        """
        stats = StepStats(*torch.stack(self._stats).double().unbind(dim=1))
        phases = clock.drain()
        elapsed = time.perf_counter() - self._start_time
        W = self._ranks.world_size
        mean = torch.stack([stats.loss.mean(), stats.sharpness.nanmean(), stats.num_kept.sum(), stats.skipped.sum()])
        loss, sharpness, kept, skipped, stops, waited = self._ranks.sum_(
            torch.cat([mean, mean.new_tensor([float(stop), sum(phases.get("data", []))])])
        ).tolist()
        steps = self._state.step - self._start_step
        samples = self._state.samples_seen - self._start_samples
        row = TrainRow(
            step=self._state.step,
            epoch=self._state.samples_seen / self._data.num_samples,
            loss=loss / W,
            lr=lr,
            grad_norm=stats.grad_norm.nanmean().item(),
            sharpness=sharpness / W,
            kept_fraction=kept / samples,
            images_per_second=samples / elapsed,
            step_seconds=elapsed / steps,
            data_wait_seconds=waited / W / steps,
            rho=rule.rho,
            beta=rule.beta,
            gamma=rule.gamma,
            selection_threshold=stats.threshold[-1].item(),
            samples=self._state.samples_seen,
            kept_samples=int(kept),
            skipped_perturbations=int(skipped),
            skipped_samples=_newly(self._data.skipped, self._skipped_samples),
            phases=phases,
        )
        self._stats.clear()
        self._skipped_samples = dict(self._data.skipped)
        self._start_step, self._start_samples = self._state.step, self._state.samples_seen
        self.restart()
        return row, stops > 0


def _newly(counts: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {reason: count - before.get(reason, 0) for reason, count in counts.items()}


def _check_finite(row: TrainRow, checkpoints: Checkpoints) -> None:
    if not math.isfinite(row.loss):
        raise LossNotFiniteError(
            f"the training loss is not finite at step {row.step}: lower optim.lr (now {row.lr:.3g}) or method.rho "
            f"(now {row.rho:.3g}); {checkpoints.way_back()}"
        )


def _validate(
    engine: Engine, validation: ValidationData, ranks: Ranks, metrics: Metrics, state: TrainState, num_samples: int
) -> float:
    start, skipped = time.perf_counter(), dict(validation.skipped)
    in_step = isinstance(engine, Zero3Engine)
    score = evaluate(engine.module, validation, ranks, in_step=in_step, beat=metrics.heartbeat)
    metrics.validation(
        ValidationRow(
            step=state.step,
            epoch=state.samples_seen / num_samples,
            accuracy=score.accuracy,
            top5_accuracy=score.top5_accuracy,
            loss=score.loss,
            seconds=time.perf_counter() - start,
            skipped_samples=_newly(validation.skipped, skipped),
        )
    )
    return score.accuracy


def _save(
    engine: Engine,
    state: TrainState,
    memory: Memory,
    ranks: Ranks,
    metrics: Metrics,
    checkpoints: Checkpoints,
    accuracy: float | None,
    *,
    is_last: bool,
) -> None:
    """Write a checkpoint. One that the disk refuses ends the run only where it was to be the last."""
    start = time.perf_counter()
    engine_state = engine.state_dict()
    failure: UserError | None = None
    if ranks.is_first:
        whole = {"engine": engine_state, "train": asdict(state), "method": memory.state_dict()}
        try:
            checkpoints.save(whole, state.step, accuracy)
        except UserError as error:
            failure = error
    # Told to all, so that all end, or all go on.
    failure = ranks.share(failure)
    if isinstance(failure, CheckpointNotWrittenError):
        metrics.checkpoint_failed(state.step)
        if not is_last:
            if ranks.is_first:
                logger.error("%s; tried again at the next", failure)
            return
    if failure is not None:
        raise failure
    metrics.checkpoint_saved(state.step, time.perf_counter() - start)
