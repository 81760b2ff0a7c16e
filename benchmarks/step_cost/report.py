"""From stored times and counts to ratios, a table and a plot."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with the names above it if it is the first."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise(times: list[dict[str, str]], counts: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One row for each model and mode: ratios to SGD, and what was counted."""
    repetitions: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in times:
        repetitions[row["model"], row["repetition"]].append(row)
    ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (model, _), rows in repetitions.items():
        for clock in ("wall", "cpu"):
            for mode, ratio in to_sgd(rows, clock):
                ratios[model, mode, clock].append(ratio)
    summary = []
    for row in counts:
        sgd = next(other for other in counts if other["model"] == row["model"] and other["mode"] == "sgd")
        known: dict[str, Any] = {
            "model": row["model"],
            "mode": row["mode"],
            "flop_ratio": float(row["flops_per_sample"]) / float(sgd["flops_per_sample"]),
        }
        for clock in ("wall", "cpu"):
            values = ratios[row["model"], row["mode"], clock]
            quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [math.nan] * 3
            names = (f"{clock}_q1", f"{clock}_median", f"{clock}_q3", f"{clock}_mean")
            known |= dict(zip(names, [*quartiles, statistics.mean(values or [math.nan])], strict=True))
        known |= {
            "steps": len(ratios[row["model"], row["mode"], "wall"]),
            "extra_memory_bytes": int(row["peak_bytes"]) - int(sgd["peak_bytes"]),
            "memory_ratio": int(row["peak_bytes"]) / int(sgd["peak_bytes"]),
            "traffic_bytes": int(row["traffic_bytes"]),
        }
        summary.append(known)
    return summary


def to_sgd(rows: list[dict[str, str]], clock: str) -> Iterator[tuple[str, float]]:
    """Each step of one repetition, in the order taken, as a multiple of SGD: of the mean of the steps before and after
    it, and for SGD itself of all. A repetition that was stopped in the middle yields what has SGD on both sides.
    """
    seconds = [float(row[clock]) for row in rows]
    places = [place for place, row in enumerate(rows) if row["mode"] == "sgd"]
    for before, after in pairwise(places):
        for place in range(before + 1, after):
            yield rows[place]["mode"], 2 * seconds[place] / (seconds[before] + seconds[after])
    if len(places) > 1:
        mean = statistics.mean(seconds[place] for place in places)
        yield from (("sgd", seconds[place] / mean) for place in places)


def table(summary: list[dict[str, Any]], model: str) -> str:
    """One model's rows in Markdown."""
    lines = [
        "| mode | FLOPs / SGD | time / SGD: median (quartiles) | mean | processor time / SGD | steps "
        "| memory above SGD | traffic / gradient |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row for row in summary if row["model"] == model]
    for row in rows:
        measured = f"{row['wall_median']:.2f} ({row['wall_q1']:.2f}-{row['wall_q3']:.2f})"
        others = row["traffic_bytes"] - rows[0]["traffic_bytes"]
        traffic = (
            "1"
            if others == 0
            else f"1 + {others} B"
            if others < 1e6
            else f"{1 + others / rows[0]['traffic_bytes']:.2f}"
        )
        lines.append(
            f"| {row['mode']} | {row['flop_ratio']:.2f} | {measured} | {row['wall_mean']:.2f} "
            f"| {row['cpu_median']:.2f} | {row['steps']} | {row['extra_memory_bytes'] / 2**20:+.0f} MiB | {traffic} |"
        )
    return "\n".join(lines)


def plot(summary: list[dict[str, Any]], path: Path, title: str) -> None:
    """Measured ratio beside FLOP ratio, by mode, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in summary))
    modes = list(dict.fromkeys(row["mode"] for row in summary))
    figure, panels = pyplot.subplots(1, len(models), sharey=True, squeeze=False, figsize=(3 + 3.6 * len(models), 7))
    for panel, model in zip(panels[0], models, strict=True):
        for row in (row for row in summary if row["model"] == model):
            y = modes.index(row["mode"])
            panel.plot(row["flop_ratio"], y, "D", color="white", markeredgecolor="tab:blue", zorder=3)
            panel.plot([row["wall_q1"], row["wall_q3"]], [y, y], "-", color="tab:orange", linewidth=5, alpha=0.4)
            panel.plot(row["wall_median"], y, "o", color="tab:orange", markersize=5, zorder=2)
        panel.set(title=model, xlabel="cost of a step / SGD", xlim=(0.4, 2.6))
        panel.grid(axis="x", alpha=0.4)
        for ratio in (1.0, 2.0):
            panel.axvline(ratio, color="grey", linewidth=0.8)
    panels[0][0].set_yticks(range(len(modes)), modes)
    panels[0][0].invert_yaxis()
    handles = [
        pyplot.Line2D([], [], marker="D", linestyle="", color="white", markeredgecolor="tab:blue", label="FLOPs"),
        pyplot.Line2D([], [], marker="o", color="tab:orange", label="measured: median and quartiles"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)


def report(name: str, counts_name: str) -> None:
    """Table and plot from the stored times and counts, of the modes that have times."""
    times = read(RESULTS / f"times_{name}.csv")
    timed = {(row["model"], row["mode"]) for row in times}
    counts = read(RESULTS / f"counts_{counts_name}.csv")
    counts = [row for row in counts if not times or (row["model"], row["mode"]) in timed]
    summary = summarise(times, counts)
    path = RESULTS / f"summary_{name}.csv"
    path.unlink(missing_ok=True)
    for row in summary:
        append(path, row)
    models = list(dict.fromkeys(row["model"] for row in summary))
    machine = counts[0]["machine"]
    tables = "\n\n".join(f"### {model}\n\n{table(summary, model)}" for model in models)
    path.with_suffix(".md").write_text(f"{machine}\n\n{tables}\n")
    plot(summary, path.with_suffix(".png"), machine)
    print(f"{machine}\n\n{tables}")
