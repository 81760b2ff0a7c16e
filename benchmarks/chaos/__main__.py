"""A campaign of faults: jobs that are killed, stopped, starved and cut off at random, and must lose nothing.

    python -m benchmarks.chaos --faults 1000 --jobs 2 [--seed 1] [--only KIND ...] [--continue] [--minutes 60]
    python -m benchmarks.chaos --report            # the page of results/ again

Each job trains a tiny network on a few digits, by `esam-dist launch` on two or three ranks, under an outer supervisor
that starts the agent again when that has ended. A schedule, drawn from the seed and the job's number, says which fault
is due at which update. At its end a job must have, to the last bit, the weights and the optimizer state of an
undisturbed run of its configuration; by a log of sample keys, every sample exactly once per epoch; and no process, no
shared memory and no partial file may be left. Faults of the disk and the network, and a /dev/shm of the job's own, need
root on Linux; without it those kinds are left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.chaos.campaign import Campaign, hold
from benchmarks.chaos.configurations import ALL, Configuration
from benchmarks.chaos.report import page
from benchmarks.chaos.schedule import KINDS

RESULTS = Path(__file__).parent / "results"
STEPS = 400


def main(argv: list[str] | None = None) -> int:
    """Hold the campaign, and write its page; 1 where a job was not equal to its undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000, help="so many must have come about")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--updates", type=int, default=STEPS, help="of each job")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--configurations", nargs="+", metavar="ENGINE-RANKS-METHOD", help="others than the usual ones")
    parser.add_argument("--continue", dest="goes_on", action="store_true", help="a campaign that lies in --out")
    parser.add_argument("--minutes", type=float, default=1e6, help="no job begins later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="folder of the jobs; those that fail are left there")
    parser.add_argument("--report", action="store_true", help="only write the page of --out again")
    args = parser.parse_args(argv)
    if not args.report:
        work = args.work or Path(tempfile.mkdtemp(prefix="chaos_"))
        kinds = tuple(args.only or KINDS)
        chosen = tuple(map(Configuration.named, args.configurations or [])) or tuple(ALL)
        begun = time.time()
        hold(
            Campaign(args.out, work, args.seed, args.updates, kinds, configurations=chosen),
            args.faults,
            args.jobs,
            goes_on=args.goes_on,
            minutes=args.minutes,
        )
        _describe(args, time.time() - begun)
    text, failed = page(args.out)
    (args.out / "campaign.md").write_text(text)
    print(text)
    return int(failed > 0)


def _describe(args: argparse.Namespace, seconds: float) -> None:
    version = f"torch {torch.__version__}, Python {platform.python_version()}, Linux {platform.release()}"
    only = f" --only {' '.join(args.only)}" if args.only else ""
    command = f"python -m benchmarks.chaos --faults {args.faults} --jobs {args.jobs} --seed {args.seed}{only}"
    told = f"{os.cpu_count()} cores ({platform.machine()}), {version}; {seconds / 60:.0f} minutes"
    with (args.out / "circumstances.txt").open("a" if args.goes_on else "w") as file:
        file.write(f"`{command}{' --continue' if args.goes_on else ''}`: {told}\n")


if __name__ == "__main__":
    raise SystemExit(main())
