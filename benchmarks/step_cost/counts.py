"""What can be counted of a step, to the last bit: FLOPs, bytes communicated, and the most bytes held."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counters.live_bytes import LiveBytes
from benchmarks.step_cost.bench import Bench, first_draw, seeds
from benchmarks.step_cost.modes import Model, draws_early
from esam_dist.flops import flop_counter
from esam_dist.ranks import Ranks


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives, DDP's own (in C++) not among them."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[1] if "gather" in str(func) else args[0]
            self.total += sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretended_ranks(device: torch.device, world_size: int = 8) -> Iterator[Ranks]:
    """A job in which this process alone is real: collectives return at once, so that their traffic can be counted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield Ranks(world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def count_flops(model: Model, options: argparse.Namespace, device: torch.device, modes: list[str]) -> dict[str, float]:
    """FLOPs of a step by mode, per sample: at a batch of 8, to which they are proportional; a mean over draws."""
    bench = Bench(model, options, 8, Ranks(device=device))
    flops = {}
    for mode in modes:
        draws = seeds(2 if options.quick else 8) if draws_early(mode) else [0]
        if mode == "looksam, step between":
            bench.step("looksam, perturbed step", 0)
        with flop_counter() as counter:
            for seed in draws:
                bench.step(mode, seed)
        flops[mode] = counter.get_total_flops() / (8 * len(draws))
    return flops


def count_traffic(model: Model, options: argparse.Namespace, device: torch.device, modes: list[str]) -> dict[str, int]:
    """Bytes that one rank hands to collectives in a step, by mode, at a batch of 4.

    BatchNorm's statistics, averaged behind every update alike in all modes, are left out.
    """
    traffic = {}
    with pretended_ranks(device) as ranks:
        bench = Bench(model, options, 4, ranks)
        gradient = bench.count_buckets()
        bench.step("sgd", 0)  # after its first step DDP forms its buckets anew, and tells the other ranks
        for mode in modes:
            if mode == "looksam, step between":
                bench.step("looksam, perturbed step", 0)
            gradient.clear()
            with Traffic() as other:
                bench.step(mode, 0)
            traffic[mode] = sum(gradient) + other.total - bench.statistics_bytes
    return traffic


def count_memory(bench: Bench, modes: list[str], device: torch.device) -> dict[str, int]:
    """The most bytes that a step holds beyond weights and momentum, by mode; for a draw from the middle."""
    middle = min(range(100), key=lambda seed: abs(first_draw(seed) - 0.5))
    peaks = {}
    for mode in modes:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            bench.step("looksam, perturbed step" if "looksam" in mode else mode, 0)
            torch.cuda.reset_peak_memory_stats()
            bench.step(mode, middle)
            peaks[mode] = torch.cuda.max_memory_allocated() - before
        else:
            with LiveBytes() as live:
                if "looksam" in mode:
                    bench.step("looksam, perturbed step", 0)
                live.reset_peak()
                bench.step(mode, middle)
            peaks[mode] = live.peak
        bench.forget(mode)
    return peaks
