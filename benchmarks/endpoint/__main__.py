"""python -m benchmarks.endpoint: step time beside 500 hostile clients of the metrics port, and without, in turns.

One rank trains a small network by SAM, and is scraped once a second. Its time of a step is taken in turns, in one run,
so that what else the machine does meets all: without the clients (slow ones, garbage, lines without end); with them at
the port of another process, as they take time of the machine themselves; and with them at its own port.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from esam_dist import SharpnessAware, methods
from esam_dist.metrics import Metrics
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks

PLACES = ("no port", "another port", "its port")
RESULTS = Path(__file__).parent / "results" / "endpoint.csv"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="in each half of a round")
    parser.add_argument("--port", type=int, default=19400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        cfg = MetricsKeys(port=args.port, progress="lines")
        with (
            closing(Metrics(Path(folder), cfg, Ranks(), {}, Progress(planned_steps=1))) as metrics,
            elsewhere(args.port + 1),
        ):
            rows = measured(args, trained(metrics))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    by = {place: [row["step_ms_median"] for row in rows if row["clients_at"] == place] for place in PLACES}
    for other in ("another port", "no port"):
        ratios = [here / there for here, there in zip(by["its port"], by[other], strict=True)]
        print(f"time of a step with {args.clients} clients at its port over that with them at {other}:", end=" ")
        print(f"{statistics.median(ratios):.3f} (of each round: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


def trained(metrics: Metrics) -> Callable[[], None]:
    """One update, with what the loop reports of it."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    trainer = SharpnessAware(network, torch.optim.SGD(network.parameters(), lr=0.01), methods.SAM(rho=0.05))
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def step() -> None:
        trainer.step(images, labels, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))
        metrics.progress(trainer.updates)

    return step


def measured(args: argparse.Namespace, step: Callable[[], None]) -> list[dict[str, Any]]:
    """A row for each half of a round."""
    for _ in range(5):
        step()
    rows = []
    for number in range(args.rounds):
        for place in PLACES:
            ports = {"its port": args.port, "another port": args.port + 1}
            with scraping(args.port) as waits, attacking(ports.get(place), args.clients):
                times, threads, files = [], 0, 0
                begun, used = time.perf_counter(), server_seconds()
                for _ in range(args.steps):
                    start = time.perf_counter()
                    step()
                    times.append(1000 * (time.perf_counter() - start))
                    threads = max(threads, threading.active_count())
                    files = max(files, len(os.listdir("/proc/self/fd")))
                share = (server_seconds() - used) / (time.perf_counter() - begun)
            quartiles = statistics.quantiles(times, n=4)
            rows.append(
                {"round": number, "clients": args.clients, "clients_at": place}
                | {"step_ms_median": round(quartiles[1], 2)}
                | {"step_ms_q1": round(quartiles[0], 2), "step_ms_q3": round(quartiles[2], 2)}
                | {"scrapes": len(waits), "scrape_ms_max": round(1000 * max(waits, default=0.0), 1)}
                | {"scrapes_failed": sum(wait < 0 for wait in waits), "threads_max": threads, "descriptors_max": files}
                | {"server_cpu_share": round(share, 4)}
                | {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
            )
            print(rows[-1], flush=True)
    return rows


def server_seconds() -> float:
    """What the thread of the port has taken of the processor so far: the training cannot have had more of it."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "metrics")
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def elsewhere(port: int) -> Iterator[None]:
    """Inside the block, the same server in a process that does nothing else."""
    source = (
        "import sys, time; from prometheus_client import CollectorRegistry; "
        "from esam_dist.metrics.health import Pulse, Server; "
        "server = Server(CollectorRegistry(), Pulse(0.0), '127.0.0.1', int(sys.argv[1])); time.sleep(1e6)"
    )
    process = subprocess.Popen([sys.executable, "-c", source, str(port)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def attacking(port: int | None, count: int) -> Iterator[None]:
    """Inside the block, `count` hostile clients of `port`."""
    if port is None:
        yield
        return
    words = [sys.executable, "-m", "benchmarks.endpoint.clients", str(port), str(count)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    time.sleep(3)  # until they are there
    try:
        yield
    finally:
        process.kill()
        process.wait()
        time.sleep(1)


@contextmanager
def scraping(port: int) -> Iterator[list[float]]:
    """Inside the block, a scrape a second; the seconds that each took, -1 for one that failed."""
    waits: list[float] = []
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            start = time.perf_counter()
            taken = -1.0
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                taken = time.perf_counter() - start if b"esam_step" in answer.read() else -1.0
            waits.append(taken)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield waits
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
