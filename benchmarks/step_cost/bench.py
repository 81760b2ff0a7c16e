"""One network, one batch and one step of it: what is measured."""

from __future__ import annotations

import argparse
import ctypes
import random
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step_cost.modes import MODES, Model
from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.models import Classifier, compile_network
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.score import watched_head


class Bench:
    """One network and its batch; `step` is what is measured."""

    def __init__(self, model: Model, options: argparse.Namespace, batch_size: int, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self._ranks = ranks
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        network = model.build()
        module = Classifier(network, options.precision, channels_last=options.channels_last).to(ranks.device)
        watched_head(module)
        if options.compile:
            compile_network(network, by_block=options.compile == "blocks")
        # At rate 0 every mode meets the same weights, and does the same work.
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
        self._engine = NativeEngine(module, optimizer, ranks)
        images = torch.randn(batch_size, 3, model.pixels, model.pixels, device=ranks.device)
        labels = torch.randint(model.num_classes, (batch_size,), device=ranks.device)
        self._batch = Batch(images.contiguous(memory_format=layout), labels)
        self._memory: dict[str, Memory] = defaultdict(Memory)

    def step(self, mode: str, seed: int, clock: PhaseClock | None = None) -> None:
        """One step, with all that it has set going; `clock` is told of its phases."""
        esam_step(
            self._engine,
            self._batch,
            MODES[mode],
            lr=0.0,
            ranks=self._ranks,
            seed=(seed,),
            clock=clock or PhaseClock(self._ranks.device),
            memory=self._memory[mode.split(",", maxsplit=1)[0]],
        )
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

    def forget(self, mode: str) -> None:
        """Drop what the mode carries from step to step."""
        self._memory.pop(mode.split(",", maxsplit=1)[0], None)


def keep_freed_memory() -> None:
    """Let glibc give nothing back to the system (mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, -1)


def seeds(count: int) -> list[int]:
    """Seeds whose first draw, the cut of a suffix, falls into each of `count` equal parts of [0, 1) once, shuffled:
    so that few repetitions stand for all cuts.
    """
    found: dict[int, int] = {}
    for seed in range(1000 * count):
        found.setdefault(int(count * float(torch.rand((), generator=seed_step(seed)))), seed)
        if len(found) == count:
            break
    chosen = list(found.values())
    random.Random(0).shuffle(chosen)
    return chosen
