"""`make bench`: every benchmark, one after the other, in its short form; each one's docstring tells more.

python -m benchmarks           # some ten minutes on two cores
python -m benchmarks --full    # every mode on all three networks: two hours, on a machine that nobody else uses
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent

STEP_COST = ["benchmarks.step_cost"]
OTHERS = {
    "how fast images become batches": ["benchmarks.data", "--out", str(ROOT / "data/results/loaders_quick.csv")],
    "how well the windowed order shuffles": ["benchmarks.data.shuffle"],
    "what it costs to choose among all ranks": ["benchmarks.coordination"],
    "how long training stands still for a checkpoint": [
        *("benchmarks.checkpoint", "--rounds", "3", "--out", str(ROOT / "checkpoint/results/stall_quick.csv"))
    ],
    "what it costs to compare the weights over ranks": ["benchmarks.replicas"],
    "what hostile clients of the metrics port cost": [
        *("benchmarks.endpoint", "--rounds", "1", "--out", str(ROOT / "endpoint/results/endpoint_quick.csv"))
    ],
}


def main() -> None:
    """Run all, and fail with the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every network in benchmarks.step_cost, and more steps")
    step_cost = STEP_COST if parser.parse_args().full else [*STEP_COST, "--quick"]
    for title, command in {"what a step costs": step_cost, **OTHERS}.items():
        print(f"\n== {title}: python -m {' '.join(command)}\n", flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    main()
