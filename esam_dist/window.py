"""What happened in one log interval: numbers that stay on the device until a row of metrics is due."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from esam_dist import config
from esam_dist.data import TrainData
from esam_dist.metrics import TrainRow
from esam_dist.progress import Progress
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.skips import Skips
from esam_dist.step import Moment, StepStats


class Window:
    """What happened since the last row of metrics; it stays on the device until `close`."""

    def __init__(
        self,
        cfg: config.Config,
        trainer: SharpnessAware,
        data: TrainData,
        progress: Progress,
    ) -> None:
        self._cfg, self._trainer, self._data, self._progress = cfg, trainer, data, progress
        self.skips = Skips(progress, cfg.train.max_skipped_updates)
        self.is_lost = False
        """Whether a loss was not finite where the update was made all the same."""
        self._stats: list[torch.Tensor] = []
        self._begin()

    def restart(self) -> None:
        """Leave the time until now (validation, checkpoint) out of the throughput."""
        self._start_time = time.perf_counter()

    def add(self, stats: StepStats) -> None:
        """Take note of one micro-batch."""
        self._stats.append(torch.stack([*stats]))

    def close(self, moment: Moment, lr: float) -> TrainRow:
        """The row of this window, alike on all ranks but for phases.

        The one place of the loop where the host waits for the device.
        """
        stats = StepStats(*torch.stack(self._stats).double().unbind(dim=1))
        progress, method, ranks = self._progress, self._cfg.method, self._trainer.ranks
        phases = self._trainer.clock.drain()
        elapsed = time.perf_counter() - self._start_time
        W = ranks.world_size
        losses, accumulate = _finite(stats.loss), self._cfg.train.accumulate
        skipped_U, not_finite_U = (
            each.view(-1, accumulate).amax(dim=1) for each in (stats.skipped_update, stats.not_finite)
        )
        sums = torch.stack(
            [
                *(losses.nansum(), losses.isfinite().sum(), _finite(stats.sharpness).nanmean()),
                *(stats.num_kept.sum(), stats.skipped.sum(), ((1.0 - skipped_U) * not_finite_U).sum()),
            ]
        )
        loss, num_losses, sharpness, kept, skipped, lost, waited = ranks.sum_(
            torch.cat([sums, sums.new_tensor([sum(phases.get("data", []))])])
        ).tolist()
        self.is_lost = lost > 0.0
        skipped_updates = self._note_skips(skipped_U, not_finite_U)
        steps = progress.step - self._start_step
        samples = progress.samples - self._start_samples
        row = TrainRow(
            step=progress.step,
            epoch=progress.samples / self._data.num_samples,
            loss=loss / num_losses if num_losses else math.nan,
            lr=lr,
            grad_norm=_finite(stats.grad_norm).nanmean().item(),
            sharpness=sharpness / W,
            kept_fraction=kept / samples,
            images_per_second=samples / elapsed,
            step_seconds=elapsed / steps,
            data_wait_seconds=waited / W / steps,
            **({"rho": 0.0, "beta": 1.0, "gamma": 1.0} | (method.values(moment) if method.is_sharp(moment) else {})),
            selection_threshold=stats.threshold[-1].item(),
            samples=progress.samples,
            kept_samples=int(kept),
            skipped_perturbations=int(skipped),
            skipped_updates=skipped_updates,
            sharp_updates=progress.sharp_updates - self._start_sharp,
            skipped_samples=newly(self._data.skipped, self._skipped_samples),
            phases=phases,
        )
        self._begin()
        return row

    def _note_skips(self, skipped_U: Tensor, not_finite_U: Tensor) -> int:
        """How many updates were skipped; that is alike on all ranks, so that all ask together where it began."""
        skipped = skipped_U.tolist()
        num_skipped = int(sum(skipped))
        whose = self._trainer.ranks.gather_later(not_finite_U).wait().tolist() if num_skipped else []
        self.skips.note(skipped, whose, (self._progress.samples - self._start_samples) // len(skipped))
        return num_skipped

    def _begin(self) -> None:
        progress = self._progress
        self._stats.clear()
        self._skipped_samples = dict(self._data.skipped)
        self._start_step, self._start_samples = progress.step, progress.samples
        self._start_sharp = progress.sharp_updates
        self.restart()


def newly(counts: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """What `counts` have beyond `before`."""
    return {reason: count - before.get(reason, 0) for reason, count in counts.items()}


def _finite(values: Tensor) -> Tensor:
    """`values` with nan for what is infinite."""
    return torch.where(values.isfinite(), values, torch.nan)
