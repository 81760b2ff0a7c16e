"""The four figures of the simulation."""

from __future__ import annotations

import math

import matplotlib as mpl

from benchmarks.coordination.draws import RESULTS, SCORES, Row
from benchmarks.coordination.network import NETWORKS

mpl.use("Agg")
from matplotlib import pyplot as plt


def plot_stragglers(rows: list[Row]) -> None:
    """Descent inflation against the number of ranks, one panel a distribution, gamma 0.5."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, SCORES, strict=False):
        # Factor 2 is no capacity at gamma 0.5.
        for color, factor in enumerate((math.inf, 1.5, 1.25, 1.0)):
            label = "no capacity" if factor == math.inf else f"capacity factor {factor:g}"
            line = _pick(rows, scores=name, gamma=0.5, capacity_factor=factor, overflow="passed on")
            axis.plot(
                _column(line, "W"), _column(line, "descent_inflation"), "o-", ms=3, label=label, color=f"C{color}"
            )
        axis.set(title=name, xscale="log")
        axis.set_xticks([2, 8, 32, 128, 512], ["2", "8", "32", "128", "512"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("samples in the descent, slowest rank / kept by the mean rank")
    for axis in [*axes[1, :3], axes[0, 3]]:
        axis.set_xlabel("ranks")
        axis.tick_params(labelbottom=True)
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=12)
    figure.suptitle("Straggler inflation of the descent pass; gamma 0.5, 64 samples a rank")
    figure.savefig(RESULTS / "straggler.png", dpi=110)


def plot_overflow(rows: list[Row]) -> None:
    """What a capacity leaves out, 64 ranks."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for color, name in enumerate(SCORES):
        line = _pick(rows, scores=name, W=64, gamma=0.5, overflow="passed on")
        line = [row for row in line if row["capacity_factor"] != math.inf]
        axes[0].plot(
            _column(line, "capacity_factor"), [100 * share for share in _column(line, "missed_share")], "o-", label=name
        )
        for mark, overflow in (("o", "passed on"), ("x", "dropped")):
            point = _pick(rows, scores=name, W=64, gamma=0.5, overflow=overflow, capacity_factor=1.25)[0]
            x, y = 100 * float(point["kept_of_wanted"]), 100 * float(point["rise_kept"])
            axes[1].plot(x, y, mark, color=f"C{color}", ms=9, label=name if mark == "o" else None)
    axes[0].set(
        xlabel="capacity factor (1 = every rank keeps its even share: scope rank)",
        ylabel="samples of the exact choice not kept, %",
        title="Overflow passed on",
    )
    axes[0].legend()
    axes[1].set(
        xlabel="samples kept, % of those wanted",
        ylabel="sum of kept rises, % of the exact choice",
        title="Capacity factor 1.25: overflow passed on (o) or dropped (x)",
    )
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle("The price of a capacity; 64 ranks of 64 samples, gamma 0.5")
    figure.savefig(RESULTS / "overflow.png", dpi=110)


def plot_thresholds(rows: list[Row]) -> None:
    """Errors of the choice by quantiles against the number of ranks."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    names = ["alike ranks", "rank effect 1", "60% zero, rank effect 0.5"]
    for color, Q in enumerate((4, 8, 16, 32)):
        for style, name in zip(("-", "--", ":"), names, strict=True):
            line = _pick(rows, scores=name, gamma=0.5, capacity_factor=1.25, rule="by_threshold", Q=Q)
            label = f"Q = {Q}" if name == names[0] else None
            error = [100 * value for value in _column(line, "total_error_absolute")]
            axes[0].plot(_column(line, "W"), error, style, color=f"C{color}", marker="o", ms=3, label=label)
            differing = [100 * value for value in _column(line, "differing_share")]
            axes[1].plot(_column(line, "W"), differing, style, color=f"C{color}", marker="o", ms=3, label=label)
            line = _pick(rows, scores=name, gamma=0.5, capacity_factor=1.25, rule="by_allotment", Q=Q)
            differing = [100 * value for value in _column(line, "differing_share")]
            axes[2].plot(_column(line, "W"), differing, style, color=f"C{color}", marker="o", ms=3, label=label)
    titles = ("Threshold: error of the number kept", "Threshold: samples that differ", "Allotment: samples that differ")
    units = ("mean |kept - wanted|, % of wanted", "kept by one choice only, %", "kept by one choice only, %")
    for axis, title, unit in zip(axes, titles, units, strict=True):
        axis.set(title=title, ylabel=unit, xlabel="ranks", xscale="log")
        axis.set_xticks([2, 8, 64, 256, 1024], ["2", "8", "64", "256", "1024"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    axes[2].sharey(axes[1])
    figure.suptitle(
        "Choice by Q quantiles a rank: "
        + ", ".join(f"{n} ({s})" for n, s in zip(names, ("-", "--", "..."), strict=True))
    )
    figure.savefig(RESULTS / "thresholds.png", dpi=110)


def plot_transport(rows: list[Row]) -> None:
    """Exposed latency of both transports against the number of ranks, and of the total's all-reduce."""
    cases = (("scores", 64, "C0"), ("scores", 1024, "C1"), ("thresholds", "any", "black"))
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), sharey=True, layout="constrained")
    for axis, network in zip(axes, NETWORKS, strict=True):
        for style, algorithm in (("-", "ring"), ("--", "tree")):
            for transport, B, color in cases:
                line = _pick(rows, network=network.name, algorithm=algorithm, transport=transport, B=B)
                width = 1.2 if transport == "thresholds" else 3.5
                label = f"{transport}, {'Q = 16' if B == 'any' else f'B = {B}'}, {algorithm}"
                latency = _column(line, "exposed_microseconds")
                axis.plot(_column(line, "W"), latency, style, color=color, lw=width, label=label)
        line = _pick(rows, network=network.name, algorithm="tree", transport="thresholds")
        total = _column(line, "hidden_microseconds")
        axis.plot(_column(line, "W"), total, ":", color="C3", lw=2, label="the kept total's all-reduce (hidden), tree")
        axis.set(title=network.name, xlabel="ranks", xscale="log", yscale="log", xlim=(1.8, 1150))
        axis.set_xticks([2, 8, 32, 128, 512], ["2", "8", "32", "128", "512"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("latency a step, microseconds")
    axes[0].legend(fontsize=9)
    figure.suptitle("Latency of the all-gather before the descent (alpha-beta model, not measured)")
    figure.savefig(RESULTS / "transport.png", dpi=110)


def _pick(rows: list[Row], **keys: str | int | float) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def _column(rows: list[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]
