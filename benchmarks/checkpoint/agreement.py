"""What it costs that the ranks agree on a stop: one sum over ranks, and its share of updates of various lengths.

    python -m benchmarks.checkpoint.agreement [--ranks 2] [--out FILE]

Real ranks on this machine over gloo. An update is a sleep, so that ranks are not in step by themselves more than
updates would have them. Prints the median and quartiles of a sum, and the seconds of all sums as a share of all time.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from pathlib import Path

import torch.multiprocessing as mp

from esam_dist.agreement import Agreement
from esam_dist.ranks import joined

RESULTS = Path(__file__).parent / "results"
UPDATES = {0.002: 2000, 0.02: 300, 0.2: 30}
"""How many of each length, in seconds."""


def measure(rank: int, world_size: int, port: int, out: Path) -> None:
    """On one rank; the first one writes the rows."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    rows = []
    with joined(60.0) as ranks:
        for length, count in UPDATES.items():
            agreement, sums = Agreement(ranks, lambda: False), []
            begun = time.perf_counter()
            for _ in range(count):
                time.sleep(length)
                start = time.perf_counter()
                if agreement.round(lambda: (0.0,) * 4) is not None:
                    sums.append(time.perf_counter() - start)
            low, middle, high = statistics.quantiles(sums, n=4)
            share = sum(sums) / (time.perf_counter() - begun)
            rows.append((world_size, length, count, len(sums), 1e3 * middle, 1e3 * low, 1e3 * high, share))
    if rank == 0:
        with out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("ranks", "update_s", "updates", "sums", "median_ms", "q1_ms", "q3_ms", "share_of_time"))
            writer.writerows(rows)
        print(out.read_text())


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=29417)
    parser.add_argument("--out", type=Path, default=RESULTS / "agreement.csv")
    args = parser.parse_args()
    mp.spawn(measure, (args.ranks, args.port, args.out), args.ranks)  # type: ignore[no-untyped-call]  # torch's is untyped


if __name__ == "__main__":
    main()
