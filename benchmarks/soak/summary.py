"""Is it flat? First quarter against last quarter, and the slope with its interval."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

WARM_UP_SHARE = 0.05
"""The beginning that is left out: processes are still growing to the size that they work at."""
BLOCKS = 16
"""Samples in a row are alike; their means over so many blocks are nearly independent."""
MOST_PER_HOUR = 0.01
"""Flat is what grows by less than this share of its level in an hour, or by less than `LEAST`."""
LEAST = {"descriptors": 0.5, "threads": 0.5, "shared_memory_bytes": 2**20}
LEAST_BYTES = 2 * 2**20
MEASURES = ("rss_bytes", "pss_bytes", "anonymous_bytes", "shared_memory_bytes", "descriptors", "threads")

Series = list[tuple[float, float]]


class Trend(NamedTuple):
    """How one measure of one process moved: values per hour where it says so."""

    first: float
    """Mean of the first quarter."""
    last: float
    slope: float
    low: float
    high: float

    def verdict(self, measure: str) -> str:
        """`flat` or `rises`, where the slope's whole 95% interval lies on that side of what counts as growth."""
        most = max(MOST_PER_HOUR * abs(self.first), LEAST.get(measure, LEAST_BYTES))
        return "flat" if self.high <= most else "rises" if self.low > most else "undecided"


def trend(series: Series) -> Trend:
    """First and last quarter, and the slope over means of blocks, of (seconds, value) in order."""
    start = series[0][0] + WARM_UP_SHARE * (series[-1][0] - series[0][0])
    kept = [(seconds / 3600, value) for seconds, value in series if seconds >= start]
    values = [value for _, value in kept]
    quarter = max(1, len(kept) // 4)
    blocks = [kept[place * len(kept) // BLOCKS : (place + 1) * len(kept) // BLOCKS] for place in range(BLOCKS)]
    points = [(_mean([x for x, _ in block]), _mean([y for _, y in block])) for block in blocks if block]
    fit = stats.linregress([x for x, _ in points], [y for _, y in points])
    half = float(stats.t.ppf(0.975, len(points) - 2)) * float(fit.stderr)
    slope, half = (float(fit.slope), half) if len(set(values)) > 1 else (0.0, 0.0)
    return Trend(_mean(values[:quarter]), _mean(values[-quarter:]), slope, slope - half, slope + half)


def read(path: Path) -> dict[tuple[str, str, str], Series]:
    """The series of every measure by (process, measure, ""), of those processes that lived to the end."""
    series: dict[tuple[str, str, str], Series] = defaultdict(list)
    last = 0.0
    with path.open() as file:
        for row in csv.DictReader(file):
            last = float(row["seconds"])
            name = f"{row['role']} {row['rank']}".strip()
            for measure in [*MEASURES, "run_folder_bytes", "step", "scrapes", "failed_scrapes"]:
                if row[measure]:
                    series[name, measure, row["pid"]].append((last, float(row[measure])))
    return {key: points for key, points in series.items() if len(points) >= BLOCKS and points[-1][0] > 0.9 * last}


def summarise(path: Path, told: Sequence[str]) -> str:
    """A page about the samples in `path`; `told` are lines about how they came to be."""
    series = read(path)
    lines = ["# Soak", "", *(f"- {line}" for line in told), *(f"- {line}" for line in _job(series))]
    lines += ["", "| process | pid | measure | first quarter | last quarter | slope per hour (95%) | verdict |"]
    lines += ["|---|---|---|---:|---:|---:|---|"]
    verdicts: list[str] = []
    for (name, measure, pid), points in sorted(series.items()):
        if measure not in MEASURES:
            continue
        found = trend(points)
        verdicts.append(found.verdict(measure))
        slope = f"{_shown(found.slope, measure)} ({_shown(found.low, measure)} to {_shown(found.high, measure)})"
        ends = f"{_shown(found.first, measure)} | {_shown(found.last, measure)}"
        lines.append(f"| {name} | {pid} | {measure.removesuffix('_bytes')} | {ends} | {slope} | {verdicts[-1]} |")
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("flat", "rises", "undecided"))
    lines += ["", f"**Of {len(verdicts)} series {counts}.** {_rule()}"]
    return "\n".join(lines) + "\n"


def _job(series: dict[tuple[str, str, str], Series]) -> list[str]:
    whole = {measure: points for (name, measure, _), points in series.items() if name == "job"}
    if not whole:
        return []
    last = {measure: points[-1][1] for measure, points in whole.items()}
    folder = trend(whole["run_folder_bytes"])
    return [
        f"{last['step']:.0f} updates, {last['scrapes']:.0f} scrapes answered, {last['failed_scrapes']:.0f} not (before "
        "the ports were open)",
        f"run folder: {folder.first / 2**20:.2f} MiB in the first quarter, {folder.last / 2**20:.2f} in the last; rows "
        "and logs grow with every epoch by design",
    ]


def _rule() -> str:
    return (
        f"Growth is a slope of more than {MOST_PER_HOUR:.0%} of the level per hour, or than "
        f"{LEAST_BYTES / 2**20:.0f} MiB (shared memory 1 MiB, descriptors and threads 0.5) where that is more; "
        "flat and rising are what the whole 95% interval says. The "
        f"first {WARM_UP_SHARE:.0%} is warm-up and left out; the slope is of {BLOCKS} means of blocks. Anonymous "
        "memory is the process's own; RSS and PSS also move with what other processes do to shared pages."
    )


def _shown(value: float, measure: str) -> str:
    return f"{value / 2**20:.2f} MiB" if measure.endswith("_bytes") else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
