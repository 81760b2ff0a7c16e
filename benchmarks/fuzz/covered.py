"""How much of a target's modules its corpus reaches, by coverage.py, in a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

SECONDS = 180
PACKAGE = Path(__file__).resolve().parents[2] / "esam_dist"


def covered(name: str, folder: Path) -> tuple[int, int]:
    """Lines of the target's modules that run with the corpus in `folder`, imports included, and how many there are."""
    words = [sys.executable, "-m", "benchmarks.fuzz.covered", name, str(folder)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=4 * SECONDS, check=True)
    lines, of_lines = json.loads(ended.stdout.splitlines()[-1])
    return lines, of_lines


def main() -> None:
    """Run the corpus once, as far as it comes in time, and print the two numbers."""
    import time

    import coverage

    name, folder = sys.argv[1], Path(sys.argv[2])
    counter = coverage.Coverage(data_file=None, source_pkgs=["esam_dist"])
    counter.start()
    from benchmarks.fuzz.targets import TARGETS, attempt

    logging.disable()
    target = TARGETS[name](folder / "room")
    end = time.monotonic() + SECONDS
    for path in sorted((folder / "corpus").iterdir()):
        if time.monotonic() > end:
            break
        try:
            attempt(target, path.read_bytes())
        except Exception:
            continue
    counter.stop()
    found = [counter.analysis2(str(PACKAGE / module)) for module in target.modules]
    print(json.dumps([sum(len(each[1]) - len(each[3]) for each in found), sum(len(each[1]) for each in found)]))


if __name__ == "__main__":
    main()
