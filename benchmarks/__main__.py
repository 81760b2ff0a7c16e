"""`make bench`: the short form of every benchmark, one after the other; each one's docstring tells its long form."""

from __future__ import annotations

import subprocess
import sys

SHORT = {
    "what a step costs": ["benchmarks.step_cost", "--quick"],
    "how fast images become batches": ["benchmarks.data"],
    "how well the windowed order shuffles": ["benchmarks.data_shuffle"],
    "what it costs to choose among all ranks": ["benchmarks.coordination"],
}


def main() -> None:
    """Run all, and fail with the first that fails."""
    for title, command in SHORT.items():
        print(f"\n== {title}: python -m {' '.join(command)}\n", flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    main()
