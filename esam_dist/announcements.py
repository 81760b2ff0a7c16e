"""What a run says of itself: when it begins, what is other than before, how it ended, and what to do next."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

from torch import nn

from esam_dist import config
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import TrainData
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from esam_dist.run_folder import Before
from esam_dist.stop import Stop
from esam_dist.train import learning_rate


def opening(cfg: config.Config, ranks: Ranks, module: nn.Module, data: TrainData, progress: Progress) -> str:
    """Who trains what, on what, how much of it at a time and how far."""
    millions = sum(param.numel() for param in module.parameters()) / 1e6
    left = f"{progress.planned_steps} steps"
    if progress.step:
        left = f"steps {progress.step + 1} to {progress.planned_steps}"
    rate = learning_rate(cfg, data.num_samples, _global_batch(cfg, ranks.world_size))
    return (
        f"{cfg.run.folder}: {cfg.model.name} ({millions:.2f} M parameters) by {cfg.method.name} on {_of(ranks)} "
        f"({cfg.engine.name}, {cfg.train.precision}); {data.num_samples} images of {cfg.data.image_size} pixels in "
        f"{data.num_classes} classes; {_update(cfg, ranks.world_size)} an update, peak rate {rate.peak:g}; {left}"
    )


def changes(before: Before, cfg: config.Config, ranks: Ranks, progress: Progress, num_samples: int) -> list[str]:
    """What is other than in the process that trained here last, and matters to what is learned."""
    told = []
    if cfg.data.path != before.cfg.data.path:
        told.append(f"going on with data.path = {cfg.data.path} instead of {before.cfg.data.path}")
    now, then = _global_batch(cfg, ranks.world_size), _global_batch(before.cfg, before.world_size)
    if now != then:
        stays = f"optim.lr stays {cfg.optim.lr:g}"
        if cfg.optim.lr_per_256:
            stays = f"the peak rate moves with it, by optim.lr_per_256 = {cfg.optim.lr_per_256:g}"
        told.append(
            f"going on with {_update(cfg, ranks.world_size)} an update instead of "
            f"{_update(before.cfg, before.world_size)}; {stays}: another rate needs another run.folder, with "
            f"run.resume={cfg.run.folder}"
        )
    epoch = progress.samples / num_samples
    rates = [learning_rate(each, num_samples, now) for each in (cfg, before.cfg)]
    rate, old = (each(epoch) for each in rates)
    if abs(rate - old) > 0.01 * rates[0].peak:
        told.append(
            f"train.epochs = {cfg.train.epochs:g} instead of {before.cfg.train.epochs:g}: the schedule spans all "
            f"epochs, so the rate jumps from {old:.3g} to {rate:.3g} here"
        )
    return told


def without_effect(before: Before, cfg: config.Config) -> str | None:
    """For a finished run: which keys are other than in its config.yaml, where they stay as they were."""
    then, now = config.flat(before.cfg), config.flat(cfg)
    changed = [key for key in now if now[key] != then[key] and not key.startswith("run.")]
    if not changed:
        return None
    told = ", ".join(f"{key} = {now[key]} (was {then[key]})" for key in changed)
    return (
        f"this run is finished, so nothing is trained and its config.yaml stays as it was; without effect: {told}; for "
        "a run with these choose another run.folder"
    )


def finished(cfg: config.Config, checkpoints: Checkpoints, progress: Progress, _: Stop) -> str:
    """How a run ended that came to its end, and what can be done with it."""
    folder = shlex.quote(str(cfg.run.folder))
    return (
        f"finished after {progress.step} steps: {_best(checkpoints)}; next: esam-dist evaluate {folder}, "
        f"esam-dist report {folder}, esam-dist export {folder}"
    )


def stopped(cfg: config.Config, checkpoints: Checkpoints, progress: Progress, stop: Stop) -> str:
    """How a run ended that a signal stopped, and how it goes on."""
    name = signal.Signals(stop.number).name
    paths = checkpoints.all()
    newest: Path | None = paths[-1] if paths else None
    if newest is None:
        held = f"no checkpoint is in {cfg.run.folder}; started again, it begins anew"
    elif newest.name.endswith(f"_{progress.step:08d}"):
        held = f"the checkpoint {newest} is written; the same command goes on from there"
    else:
        held = f"this step has no checkpoint; the same command goes on from {newest}"
    return f"stopped by {name} at step {progress.step} of {progress.planned_steps}: {held}"


def _best(checkpoints: Checkpoints) -> str:
    best = checkpoints.best()
    if best is None:
        return f"no checkpoint was validated (newest in {checkpoints.folder})"
    accuracy = json.loads((best / "metadata.json").read_bytes())["accuracy"]
    return f"best validation accuracy {accuracy:.4f}, in {best}"


def _of(ranks: Ranks) -> str:
    return f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)} of {ranks.device.type}"


def _global_batch(cfg: config.Config, world_size: int) -> int:
    return cfg.data.batch_size * cfg.train.accumulate * world_size


def _update(cfg: config.Config, world_size: int) -> str:
    factors = [str(cfg.data.batch_size)]
    factors += [f"{world_size} ranks"] if world_size > 1 else []
    factors += [f"{cfg.train.accumulate} micro-batches"] if cfg.train.accumulate > 1 else []
    product = f" ({' x '.join(factors)})" if len(factors) > 1 else ""
    return f"{_global_batch(cfg, world_size)} images{product}"
