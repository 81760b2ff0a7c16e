"""One network, one batch and one step of it: what is measured."""

from __future__ import annotations

import argparse
import ctypes
import random
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step_cost.modes import MODES, Model, update_of
from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.losses import CrossEntropy
from esam_dist.models import Classifier, compile_network
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment
from esam_dist.step.score import Head


class Bench:
    """One network and its batch; `step` is what is measured."""

    def __init__(self, model: Model, options: argparse.Namespace, batch_size: int, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self._ranks = ranks
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        network = model.build()
        module = Classifier(network, options.precision, channels_last=options.channels_last).to(ranks.device)
        Head(module)
        if options.compile:
            compile_network(network, by_block=options.compile == "blocks")
        # At rate 0 every mode meets the same weights, and does the same work.
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
        self._engine = NativeEngine(module, optimizer, ranks)
        images = torch.randn(batch_size, 3, model.pixels, model.pixels, device=ranks.device)
        labels = torch.randint(model.num_classes, (batch_size,), device=ranks.device)
        self._batch = Batch(images.contiguous(memory_format=layout), labels)
        self._trainers: dict[str, SharpnessAware] = {}

    def step(self, mode: str, seed: int, clock: PhaseClock | None = None) -> None:
        """One step, with all that it has set going; `clock` is told of its phases."""
        name = mode.split(",", maxsplit=1)[0]
        if name not in self._trainers:
            self._trainers[name] = SharpnessAware.over(self._engine, MODES[mode], self._ranks)
        trainer = self._trainers[name]
        trainer.method, trainer.clock = MODES[mode], clock or PhaseClock(self._ranks.device)
        images, labels = self._batch
        trainer.step(images, labels, CrossEntropy(0.0), moment=Moment(update_of(mode, seed)), lr=0.0)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def count_buckets(self) -> list[int]:
        """After a step of SGD, the bytes of each gradient that DDP averages from it on; it then averages nothing."""
        sizes: list[int] = []

        def count(_, bucket):  # DDP cannot read annotations that are text
            sizes.append(bucket.buffer().nbytes)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        def watch(module: nn.Module, _: Any) -> None:
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(None, count)

        # The engine does not show its DDP; every module that is called shows itself to a global hook.
        watching = register_module_forward_pre_hook(watch)
        self.step("sgd", 0)
        watching.remove()
        return sizes

    @property
    def statistics_bytes(self) -> int:
        """Of the buffers that are averaged behind an update."""
        return sum(buffer.nbytes for buffer in self._engine.module.buffers() if buffer.is_floating_point())

    def forget(self, mode: str) -> None:
        """Drop what the mode carries from step to step."""
        self._trainers.pop(mode.split(",", maxsplit=1)[0], None)


def keep_freed_memory() -> None:
    """Let glibc give nothing back to the system (mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, -1)


def first_draw(seed: int) -> float:
    """What the step with `seed` draws first: the cut of a suffix."""
    return float(torch.rand((), generator=seed_step(0, seed, 0, 0)))


def seeds(count: int) -> list[int]:
    """Seeds whose first draw, the cut of a suffix, falls into each of `count` equal parts of [0, 1) once, shuffled:
    so that few repetitions stand for all cuts.
    """
    found: dict[int, int] = {}
    for seed in range(1000 * count):
        found.setdefault(int(count * first_draw(seed)), seed)
        if len(found) == count:
            break
    chosen = list(found.values())
    random.Random(0).shuffle(chosen)
    return chosen
