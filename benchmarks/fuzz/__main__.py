"""python -m benchmarks.fuzz TARGET --minutes N: fuzz what reads files, and add a row to results/campaign.csv.

TARGET is one of those in `targets`, or `all`. Needs the extra `fuzz`. The corpus and what was found stay in --folder,
for the next time to go on from. Exits with 1 where anything was found.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.fuzz.covered import covered
from benchmarks.fuzz.targets import TARGETS

RESULTS = Path(__file__).parent / "results" / "campaign.csv"
LIMITS = ("-timeout=60", "-rss_limit_mb=4096", "-max_len=65536", "-print_final_stats=1")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="for corpus and findings")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if find_spec("atheris") is None or find_spec("coverage") is None:
        sys.exit("atheris and coverage are not installed: pip install 'esam-dist[fuzz]'")
    rows = [
        campaign(name, args.minutes, args.seed, args.folder / name)
        for name in (TARGETS if args.target == "all" else [args.target])
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    is_new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    sys.exit(any(row["findings"] for row in rows))


def campaign(name: str, minutes: float, seed: int, folder: Path) -> dict[str, object]:
    """Fuzz one target for so long, again after whatever ended the process, and sum up."""
    folder.mkdir(parents=True, exist_ok=True)
    log, start = folder / "log", time.monotonic()
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) / 60
    executions = edges = ends = peak = 0
    while (left := round(60 * minutes - (time.monotonic() - start))) > 0:
        words = [sys.executable, "-m", "benchmarks.fuzz.harness", name, str(folder), f"-max_total_time={left}"]
        with log.open("w") as file:
            status = subprocess.run(
                [*words, f"-seed={seed + ends}", f"-artifact_prefix={folder}/findings/end-", *LIMITS],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        text = log.read_text(errors="replace")
        executions += last(r"stat::number_of_executed_units: (\d+)", text) or last(r"^#(\d+)", text)
        edges, peak = max(edges, last(r"cov: (\d+)", text)), max(peak, last(r"stat::peak_rss_mb:\s+(\d+)", text))
        ends += 1
        if status and time.monotonic() - start < 5.0:
            sys.exit(f"{name}: the fuzzer ends at once; {log} says why")
    minutes_taken = (time.monotonic() - start) / 60
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) / 60 - used
    lines, of_lines = covered(name, folder)
    row: dict[str, object] = {
        "target": name,
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round(minutes_taken, 1),
        "cpu_minutes": round(used, 1),
        "executions": executions,
        "processes": ends,
        "edges": edges,
        "lines_covered": lines,
        "lines": of_lines,
        "corpus": len(list((folder / "corpus").iterdir())),
        "findings": len({path.stem for path in (folder / "findings").iterdir()}),
        "peak_rss_mb": peak,
        "python": platform.python_version(),
        "atheris": version("atheris"),
        "seed": seed,
    }
    print(row, flush=True)
    return row


def last(pattern: str, text: str) -> int:
    """The number in the last match of `pattern`; 0 without one."""
    found = re.findall(pattern, text, re.MULTILINE)
    return int(found[-1]) if found else 0


if __name__ == "__main__":
    main()
