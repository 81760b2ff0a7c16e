"""The page of a campaign: faults by kind, what they cost, what was survived, and every trouble."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.chaos.campaign import read_rows
from benchmarks.chaos.schedule import KINDS

Rows = list[dict[str, str]]


def page(out: Path) -> tuple[str, int]:
    """The page of the campaign in `out`, and how many of its jobs had a trouble."""
    faults, jobs = read_rows(out / "faults.csv"), read_rows(out / "jobs.csv")
    circumstances, explained = out / "circumstances.txt", out / "explanations.txt"
    troubles = [row for row in jobs if row["trouble"]]
    survived = sum(row["survived"] == "True" for row in faults)
    lines = ["# Chaos campaign", ""]
    lines += circumstances.read_text().splitlines() if circumstances.exists() else []
    lines += [
        "",
        f"**{len(faults)} faults in {len(jobs)} jobs, {survived} survived**: the job recovered, and ended with the "
        "weights and the state of the undisturbed run, to the last bit, every sample once per epoch, and nothing left "
        f"behind. {len(jobs) - len(troubles)} of {len(jobs)} jobs were without any trouble, such as a standstill.",
        "",
        *_by_kind(faults),
        "",
        *_by_configuration(faults, jobs),
        "",
        *_words(),
        "",
        "## Troubles",
        "",
        *([f"- job {row['job']} ({row['configuration']}): {row['trouble']}" for row in troubles] or ["None."]),
    ]
    if explained.exists():
        lines += ["", explained.read_text().rstrip()]
    return "\n".join(lines) + "\n", len(troubles)


def _by_kind(faults: Rows) -> list[str]:
    lines = [
        "| fault | number | survived | seconds lost: median (largest) | updates replayed: mean |",
        "|---|--:|--:|--:|--:|",
    ]
    groups = _grouped(faults, "kind")
    for kind in [kind for kind in KINDS if kind in groups]:
        rows = groups[kind]
        lost = [float(row["lost_seconds"]) for row in rows]
        replayed = statistics.fmean(float(row["replayed_updates"]) for row in rows)
        survived = sum(row["survived"] == "True" for row in rows)
        cost = f"{statistics.median(lost):.1f} ({max(lost):.1f})"
        lines.append(f"| {KINDS[kind].text} | {len(rows)} | {survived} | {cost} | {replayed:.1f} |")
    return lines


def _by_configuration(faults: Rows, jobs: Rows) -> list[str]:
    lines = ["| engine, ranks, method | hosts | jobs | faults | undisturbed, s | under faults, s | goodput |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in jobs:
        groups[row["configuration"], row["hosts"]].append(row)
    for (name, hosts), rows in sorted(groups.items()):
        count = sum(row["configuration"] == name and row["hosts"] == hosts for row in faults)
        seconds = statistics.fmean(float(row["seconds"]) for row in rows)
        good = statistics.fmean(float(row["goodput"]) for row in rows)
        undisturbed = float(rows[0]["undisturbed_seconds"])
        lines.append(f"| {name} | {hosts} | {len(rows)} | {count} | {undisturbed:.0f} | {seconds:.0f} | {good:.2f} |")
    return lines


def _words() -> list[str]:
    return [
        "Seconds lost: from the fault until the job was further than it had ever been, less the time that the updates "
        "in between take undisturbed; a fault that hits before the last one is over takes over from it. Goodput: the "
        "time that the updates of the job take undisturbed, as a share of the time that the job took, starts included.",
    ]


def _grouped(rows: Rows, key: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups
