"""Where the time of a step goes on a CPU, phase by phase: seconds, and pages of memory that the system had to provide.

    python -m benchmarks.step_cost.phases                  # memory as glibc gives it
    python -m benchmarks.step_cost.phases --keep-memory    # what is freed stays in the process

ResNet-50 at 224 pixels, 16 images; each mode directly after a step of SGD. Adds to results/phases.csv.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections import defaultdict

import torch

from benchmarks.step_cost.bench import Bench, keep_freed_memory, seeds
from benchmarks.step_cost.modes import MODELS
from benchmarks.step_cost.report import RESULTS, append
from esam_dist.clock import PhaseClock
from esam_dist.ranks import Ranks

MODES = ["sam", "esam (paper): tensor, forward", "recycled 0.25, random"]


class Meter(PhaseClock):
    """A clock that reads the system's counters where a phase ends."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.phases: list[tuple[str, float, int]] = []
        self._seconds, self._pages = self._read()

    def end(self, phase: str) -> None:
        """Note what the phase took."""
        seconds, pages = self._read()
        self.phases.append((phase, seconds - self._seconds, pages - self._pages))
        self._seconds, self._pages = seconds, pages

    @staticmethod
    def _read() -> tuple[float, int]:
        return time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_freed_memory()
    plain = argparse.Namespace(channels_last=False, precision="fp32", compile=None)
    bench = Bench(MODELS["resnet50"], plain, 16, Ranks())
    bench.step("sgd", 0)
    found: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for seed in seeds(options.repetitions):
        for mode in (name for other in MODES for name in ("sgd", other)):
            meter = Meter()
            bench.step(mode, seed, meter)
            for phase, seconds, pages in meter.phases:
                found[mode, phase].append((seconds, pages))
    for (mode, phase), values in found.items():
        row = {
            "memory": "kept" if options.keep_memory else "glibc",
            "mode": mode,
            "phase": phase,
            "steps": len(values),
            "median_seconds": statistics.median(seconds for seconds, _ in values),
            "min_seconds": min(seconds for seconds, _ in values),
            "max_seconds": max(seconds for seconds, _ in values),
            "median_pages": int(statistics.median(pages for _, pages in values)),
            "threads": options.threads,
            "torch": torch.__version__,
        }
        append(RESULTS / "phases.csv", row)
        print(*row.values())


if __name__ == "__main__":
    main()
