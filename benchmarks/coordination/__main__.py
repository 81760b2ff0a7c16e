"""What it costs, and what it changes, to choose the descent's samples among all ranks: a simulation, no cluster needed.

    python -m benchmarks.coordination

draws scores for 2 to 1,024 ranks and applies esam_dist.selection to them. Writes to results/ beside this file, in under
two minutes on one core:

straggler.csv, .png    the slowest rank's share of the descent, without and with a capacity
overflow.png           what a capacity leaves out of the exact choice; overflow passed on or dropped
thresholds.csv, .png   the error of a choice by quantiles
transport.csv, .png    bytes and latency of both transports: a model, not a measurement

Shapes: W ranks, B samples per rank.
"""

from __future__ import annotations

import csv
import time
import warnings
from functools import partial

import torch
from torch import Tensor

from benchmarks.coordination.draws import RESULTS, Row, mixture
from benchmarks.coordination.network import model_transport
from benchmarks.coordination.plots import plot_overflow, plot_stragglers, plot_thresholds, plot_transport
from benchmarks.coordination.rules import quantiles_of_ranks, simulate_stragglers, simulate_thresholds
from esam_dist.step import selection


def measure_compute() -> list[Row]:
    """Seconds of the choice itself on one core: medians of 5; on a GPU not measured."""
    rows: list[Row] = []
    for W in (8, 64, 1024):
        scores_WB = mixture(W, 64, 0.5)
        gathered = quantiles_of_ranks(scores_WB, 16, 40)

        def thresholds(scores_WB: Tensor = scores_WB, gathered: Tensor = gathered) -> None:
            selection.quantiles(scores_WB[0], 16, 40)
            selection.select_above(scores_WB[0], selection.shared_threshold(gathered, 0.5, 64, 40), 40)

        for name, work in (("scores", partial(selection.select, scores_WB, 0.5, 40)), ("thresholds", thresholds)):
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
            rows.append({"W": W, "B": 64, "transport": name, "microseconds": sorted(seconds)[2] * 1e6})
    return rows


def write(name: str, rows: list[Row]) -> None:
    """One CSV of `rows`, numbers to five digits."""
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def main() -> None:
    """Everything, seeded."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap over ranks, which is ours here
    start = time.perf_counter()
    stragglers = simulate_stragglers(64)
    write("straggler.csv", stragglers)
    plot_stragglers(stragglers)
    plot_overflow(stragglers)
    print(f"stragglers {time.perf_counter() - start:.0f} s")
    thresholds = simulate_thresholds(64)
    write("thresholds.csv", thresholds)
    plot_thresholds(thresholds)
    print(f"thresholds {time.perf_counter() - start:.0f} s")
    transport = model_transport()
    write("transport.csv", transport)
    plot_transport(transport)
    for row in measure_compute():
        print("choice on one core:", row)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
