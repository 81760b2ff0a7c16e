"""What an update costs: exact FLOPs, and time measured in turn over all methods, in one process, before any run.

Data is not read meanwhile: the same batch is used again. The learning rate is 0, so that nothing diverges.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from esam_dist import config
from esam_dist.compare import plan
from esam_dist.compare.plan import Cost, Variant
from esam_dist.compare.study import Study
from esam_dist.data import open_train
from esam_dist.engine import MicroBatches, build_engine
from esam_dist.files import write_file
from esam_dist.flops import flop_counter
from esam_dist.network import build_network
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment
from esam_dist.train import micro_batch

log = logging.getLogger(__name__)

MOMENTS = 10
"""Of the training, at which an update is measured: methods change their cost with it. More where that is periodic."""
UNSTEADY = 1.1


def threads_of_a_run(study: Study) -> int:
    """Threads that each rank computes with, in the calibration as in the runs."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    return int(given) if given.isdigit() and int(given) else max(1, cores // (study.jobs * study.ranks))


def costs(study: Study, *, keep: bool) -> dict[str, Cost]:
    """The cost of every variant, by its name: from `calibration.json`, or measured; `keep` writes it there."""
    path = study.folder / "calibration.json"
    if path.exists():
        saved = json.loads(path.read_text())["costs"]
        return {name: Cost(row["seconds"], row["flops"], row["images"]) for name, row in saved.items()}
    measured = measure(study)
    if keep:
        write_file(path, json.dumps(measured, indent=1) + "\n")
    return {name: Cost(row["seconds"], row["flops"], row["images"]) for name, row in measured["costs"].items()}


def measure(study: Study) -> dict[str, Any]:
    """What `calibration.json` holds: how and on what it was measured, and for each variant its cost."""
    every = [variant for trials in plan.variants(study).values() for variant in trials]
    with _threads(threads_of_a_run(study)):
        log.info("calibrating %d methods and trials", len(every))
        flops = {variant.name: _flops(study, variant) for variant in every}
        # What differs in no FLOP is timed once: rho has no cost.
        alike: dict[tuple[str, float], list[str]] = {}
        for variant in every:
            alike.setdefault((variant.method, flops[variant.name]), []).append(variant.name)
        timed = [variant for variant in every if any(names[0] == variant.name for names in alike.values())]
        rounds = _time(study, timed)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    unit = rounds[every[0].name]
    rows = {}
    for variant in every:
        own = rounds[alike[variant.method, flops[variant.name]][0]]
        ratios = [_mean(mine) / _mean(theirs) for mine, theirs in zip(zip(*own), zip(*unit), strict=True)]  # noqa: B905
        if max(ratios) > UNSTEADY * min(ratios):
            log.warning(
                "%s: its time is %.2f to %.2f times that of %s; let nothing else run during the calibration",
                *(variant.name, min(ratios), max(ratios), every[0].name),
            )
        cfg = _config(study, variant)
        rows[variant.name] = {
            "seconds": _mean(statistics.median(times) for times in own),
            "flops": flops[variant.name] * study.ranks,
            "images": cfg.data.batch_size * cfg.train.accumulate * study.ranks,
            "relative_seconds": [min(ratios), statistics.median(ratios), max(ratios)],
        }
    device = Ranks.from_environment().device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads_of_a_run(study),
        "torch": torch.__version__,
        "repeats": study.repeats,
        "costs": rows,
    }


class Trainer:
    """One method at work on one batch; its weights do not move."""

    def __init__(self, cfg: config.Config) -> None:
        self._cfg, device = cfg, Ranks.from_environment().device
        data = open_train(cfg.data, seed=cfg.run.seed, rank=0, world_size=1, device=device)
        self._batch = next(iter(data.batches(0)))
        data.close()
        network, ranks = build_network(cfg, data.num_classes, device), Ranks(device=device)
        batches = MicroBatches.of(cfg.data.batch_size, cfg.train, cfg.method)
        engine = build_engine(network, ranks, cfg.optim, cfg.engine, batches)
        self._trainer = SharpnessAware.over(engine, cfg.method, ranks, seed=cfg.run.seed)
        self._trainer.engine.module.train()
        self._on_gpu = device.type == "cuda"

    def update(self, moment: Moment) -> float:
        """Seconds of one update."""
        begin = time.perf_counter()
        for _ in range(self._cfg.train.accumulate):
            micro_batch(self._trainer, self._batch, self._cfg, moment, 0.0)
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def moments(cfg: config.Config) -> list[Moment]:
    """Updates one after the other, in a row of whole periods, as if they were spread over all the training."""
    period = getattr(cfg.method, "interval", 1)
    count = period * math.ceil(MOMENTS / period)
    shares = [(number + 0.5) / count for number in range(count)]
    return [Moment(number, share * cfg.train.epochs, share) for number, share in enumerate(shares)]


def _flops(study: Study, variant: Variant) -> float:
    """Of one update on one rank, a mean over the training."""
    # Compiled code is not counted; it computes the same.
    cfg = _config(study, variant, "train.compile=false")
    trainer = Trainer(cfg)
    with flop_counter() as counter:
        for moment in moments(cfg):
            trainer.update(moment)
    return float(counter.get_total_flops()) / len(moments(cfg))


def _time(study: Study, variants: list[Variant]) -> dict[str, list[list[float]]]:
    """For each variant and moment the seconds of an update, `repeats` times; all in turn, update by update."""
    cfgs = [_config(study, variant) for variant in variants]
    trainers = [Trainer(cfg) for cfg in cfgs]
    rows = [moments(cfg) for cfg in cfgs]
    found: list[list[list[float]]] = [[[] for _ in row] for row in rows]
    for repeat in range(1 + study.repeats):
        for number in range(max(map(len, rows))):
            for trainer, row, seconds in zip(trainers, rows, found, strict=True):
                if number < len(row):
                    taken = trainer.update(row[number])
                    if repeat:  # the first warms up
                        seconds[number].append(taken)
    return {variant.name: seconds for variant, seconds in zip(variants, found, strict=True)}


def _config(study: Study, variant: Variant, *more: str) -> config.Config:
    overrides = [*plan.words(variant.overrides), "engine.name=native", "data.workers=0", *more]
    return config.load(plan.base_of(study), overrides)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
