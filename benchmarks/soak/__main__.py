"""Two hours of small training, watched: do memory, descriptors, threads and shared memory stay flat?

    python -m benchmarks.soak --minutes 120 [--out FOLDER]
    python -m benchmarks.soak --summary        # of results/samples.csv again

Two ranks of `esam-dist launch` learn the digits with ESAM, each with a loader process, validate and save a checkpoint
every epoch, and are scraped every 5 s. Every 15 s it is noted what each process of the job holds. At the end the job is
stopped by SIGTERM, and whatever process is left counts as a fault.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import torch

from benchmarks.processes import MARK, of_job, usage
from benchmarks.soak.scrape import Scraper, free_ports
from benchmarks.soak.summary import summarise
from esam_dist.data.prepare import prepare_digits

RESULTS = Path(__file__).parent / "results"
EVERY_SECONDS = 15
SCRAPE_SECONDS = 5
RANKS = 2
CONFIG = """\
run: {folder: %(folder)s}
model: {name: cifar_resnet8}
data: {path: %(data)s, batch_size: 32, workers: 1, image_size: 16}
train: {epochs: 1000000, log_every: 1000}
optim: {lr: 0.01, schedule: constant}
method: {name: esam}
metrics: {port: %(port)d, progress: lines}
"""
FIELDS = (
    *("seconds", "role", "rank", "pid", "rss_bytes", "pss_bytes", "anonymous_bytes", "shared_memory_bytes"),
    *("descriptors", "threads", "run_folder_bytes", "step", "scrapes", "failed_scrapes"),
)


def main(argv: list[str] | None = None) -> None:
    """Train and sample, or only summarise what was sampled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, help="seconds between two samples")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="only summarise what lies in --out")
    args = parser.parse_args(argv)
    samples, ended = args.out / "samples.csv", args.out / "ended.txt"
    if not args.summary:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="soak_") as folder:
            told = soak(Path(folder), samples, args.minutes, args.every)
        ended.write_text("\n".join([*told, *_circumstances(args.minutes)]) + "\n")
    text = summarise(samples, ended.read_text().splitlines())
    (args.out / "summary.md").write_text(text)
    print(text)


def soak(folder: Path, samples: Path, minutes: float, every: float = EVERY_SECONDS) -> list[str]:
    """Train for `minutes` in `folder`, write `samples`, and tell how the job ended."""
    prepare_digits(folder / "data")
    port, mark = free_ports(RANKS), uuid.uuid4().hex
    run, config = folder / "run", folder / "soak.yaml"
    config.write_text(CONFIG % {"folder": run, "data": folder / "data", "port": port})
    command = [sys.executable, "-m", "esam_dist", "launch", str(config), f"--nproc-per-node={RANKS}"]
    # No restarts: a rank that fails ends the soak, and is told.
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(command, env=os.environ | {MARK: mark}, stdout=log, stderr=log)
    scraper, over = Scraper([port + rank for rank in range(RANKS)]), threading.Event()
    threading.Thread(target=scraper.run, args=(over, SCRAPE_SECONDS), daemon=True).start()
    begun, number = time.monotonic(), 0
    try:
        with samples.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            while job.poll() is None and (seconds := time.monotonic() - begun) < 60 * minutes:
                writer.writerows(_sample(mark, round(seconds), run, scraper))
                file.flush()
                number += 1
                time.sleep(max(0.0, begun + number * every - time.monotonic()))
        lived = (time.monotonic() - begun) / 60
        job.send_signal(signal.SIGTERM)
        status = job.wait(330)
    finally:
        over.set()
        job.kill()
    return [f"{lived:.1f} minutes, exit status {status} (143: stopped in order)", *_left(mark, folder)]


def _sample(mark: str, seconds: int, run: Path, scraper: Scraper) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for process in of_job(mark):
        try:
            held = usage(process.pid)
        except OSError:
            continue  # it ended meanwhile
        rows.append({"seconds": seconds, **process._asdict(), **held._asdict()})
    size = sum(path.stat().st_size for path in run.rglob("*") if _is_file(path))
    counts = {"step": scraper.step, "scrapes": scraper.answered, "failed_scrapes": scraper.failed}
    return [*rows, {"seconds": seconds, "role": "job", "run_folder_bytes": size, **counts}]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size >= 0
    except OSError:
        return False  # a checkpoint that was just replaced


def _left(mark: str, folder: Path) -> list[str]:
    """What the job left, looked at when loaders and trackers had time to end."""
    time.sleep(5)
    processes = [f"{process.role} {process.pid}" for process in of_job(mark)]
    partial = [path.name for path in folder.rglob("*.partial*")]
    tail = (folder / "log").read_text().splitlines()[-1:]
    return [f"left behind: {', '.join(processes + partial) or 'nothing'}", f"last line of the log: {' '.join(tail)}"]


def _circumstances(minutes: float) -> list[str]:
    cores, version = os.cpu_count(), torch.__version__
    return [
        f"{cores} cores ({platform.machine()}), torch {version}, Python {platform.python_version()}, nice {os.nice(0)}",
        f"python -m benchmarks.soak --minutes {minutes:g}",
    ]


if __name__ == "__main__":
    main()
