"""Writes the tables of the documentation that are made from the configuration and from measurements.

    python -m docs.tables    # or `make tables`

A page marks the place of a table by `<!-- table NAME, ... -->` and `<!-- end of NAME -->`; what stands between them is
replaced.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from esam_dist import config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/step_cost/results"
PLACE = re.compile(r"(<!-- table (\w+)[^\n]*-->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)

Rows = dict[tuple[str, str], dict[str, str]]


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def keys() -> str:
    """Every key of the configuration, in its order."""
    rows = []
    for key in config.keys():  # noqa: SIM118
        default = f"`{key.default}`" if key.default else ""
        methods = f"*{', '.join(key.methods)}*: " if key.methods else ""
        rows.append([f"`{key.name}`", default, methods + key.description.replace("|", "\\|")])
    return table(["key", "default", "meaning"], rows)


def costs() -> str:
    """What a step of each mode costs, as `benchmarks.step_cost` has measured it."""
    measured, few, kept = (results(f"summary_{name}") for name in ("cpu", "cpu_goals", "cpu_kept_memory"))
    counts = results("counts_cpu")
    rows = []
    for (model, mode), row in measured.items():
        vit = [int(counts["vit_small", counted]["flops_per_sample"]) for counted in (mode, "sgd")]
        times = [time(row), time(few.get((model, mode))), time(kept.get((model, mode)))]
        rows.append([mode, ratio(row), *times, memory(row), f"{vit[0] / vit[1]:.2f}"])
    times = ["all modes in turn", "six modes in turn", "six, freed memory kept"]
    return table(["mode", "FLOPs", *times, "peak memory above SGD", "ViT-S/16: FLOPs"], rows)


def summary() -> str:
    """The modes that matter most, in few columns."""
    rows = [[mode, ratio(row), time(row), memory(row)] for (_, mode), row in results("summary_cpu_goals").items()]
    return table(["mode", "FLOPs", "time", "peak memory above SGD"], rows)


TABLES: dict[str, Callable[[], str]] = {"keys": keys, "costs": costs, "summary": summary}


def results(name: str) -> Rows:
    """The measurements called `name`, by network and mode."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return {(row["model"], row["mode"]): row for row in csv.DictReader(file)}


def ratio(row: dict[str, str]) -> str:
    """FLOPs as a multiple of a step of SGD."""
    return f"{float(row['flop_ratio']):.2f}"


def time(row: dict[str, str] | None) -> str:
    """Median and quartiles of the time; empty where nothing was measured."""
    if row is None:
        return ""
    return f"{float(row['wall_median']):.2f} ({float(row['wall_q1']):.2f}-{float(row['wall_q3']):.2f})"


def memory(row: dict[str, str]) -> str:
    """Peak memory, less that of a step of SGD."""
    return f"{int(row['extra_memory_bytes']) / 2**20:+.0f} MiB"


def table(names: list[str], rows: list[list[str]]) -> str:
    """Rows in Markdown, below their names."""
    lines = [f"| {' | '.join(row)} |" for row in (names, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]]) + "\n"


def fill(text: str) -> str:
    """A page's text with its tables as they have to be."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def main() -> None:
    """Write the tables of all pages."""
    for page in pages():
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
