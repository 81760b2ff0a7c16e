"""How long training stands still for a checkpoint: today's code against an older tree, where all ranks wait.

    python -m benchmarks.checkpoint [--states resnet50 vit_l_16] [--rounds 5] [--before TREE] [--out FILE]

One process and one copy of each network's state: ResNet-50 with momentum (0.2 GB), ViT-L/16 with AdamW (3.7 GB; takes
8 GB of memory). The ways take turns, each save in a process of its own and on an empty folder. `--before` is a tree
with the older code, such as `git archive REVISION` gives. Reported are medians and quartiles.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.checkpoint.save import STATES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def saved(name: str, how: str, tree: Path, scratch: Path) -> dict[str, float]:
    """One save by the code in `tree`."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        script = Path(__file__).with_name("save.py")
        answer = subprocess.run(
            [sys.executable, str(script), name, how, folder],
            env=os.environ | {"PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
        )
    if answer.returncode:
        raise SystemExit(answer.stderr)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, write the CSV and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", choices=list(STATES), default=["resnet50"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="tree of the older code; without it, only today's is measured")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="disk to write to")
    parser.add_argument("--out", type=Path, default=RESULTS / "stall.csv")
    args = parser.parse_args()
    ways = {"asynchronous": ROOT, "synchronous": ROOT} | ({"before": args.before} if args.before else {})
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    rows = [
        {"state": name, "way": way, "round": number, **saved(name, way, tree.resolve(), args.scratch), **machine}
        for name in args.states
        for number in range(args.rounds)
        for way, tree in ways.items()
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("| state | way | standstill, s | until it is on the disk, s |\n|---|---|---|---|")
    for name in args.states:
        for way in ways:
            own = [row for row in rows if (row["state"], row["way"]) == (name, way)]
            print(f"| {name} | {way} | {_spread(own, 'stall_seconds')} | {_spread(own, 'whole_seconds')} |")


def _spread(rows: list[dict[str, object]], key: str) -> str:
    values = sorted(float(str(row[key])) for row in rows)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
