"""What it costs, and what it changes, to choose the descent's samples among all ranks: a simulation, no cluster needed.

    python benchmarks/coordination.py

draws scores for 2 to 1,024 ranks and applies esam_dist.selection to them. Writes to benchmarks/results/, in under two
minutes on one core:

coordination_straggler.csv, .png    the slowest rank's share of the descent, without and with a capacity
coordination_overflow.png           what a capacity leaves out of the exact choice; overflow passed on or dropped
coordination_thresholds.csv, .png   the error of a choice by quantiles
coordination_transport.csv, .png    bytes and latency of both transports: a model, not a measurement

Scores: rises of the loss, heavy-tailed: 60% of the samples learned (log-normal, median 0.001), 35% in question (0.1),
5% hard or mislabelled (1); every fifth rise is a fall, a quarter as large. A rank effect multiplies all scores of a
rank by exp(tau * z), z normal. `digits`: drawn from real training, see benchmarks/coordination_scores.py.

Shapes: W ranks, B samples per rank, Q quantiles per rank.
"""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from torch import Tensor

from esam_dist import selection

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | int | float]
Draw = Callable[[int, int], Tensor]

NUM_RANKS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
FACTORS = [1.0, 1.25, 1.5, 2.0, math.inf]


# scores


def mixture(W: int, B: int, tau: float, saturated: float = 0.0) -> Tensor:
    """Rises as in training, [W, B]; the share `saturated` is exactly zero, like losses too small for float32."""
    kind = torch.rand(W, B)
    median = torch.full((W, B), 1e-3).where(kind < 0.60, 0.1).where(kind < 0.95, 1.0)
    sigma = torch.full((W, B), 1.5).where(kind < 0.60, 1.0).where(kind < 0.95, 0.5)
    rise = median * torch.exp(sigma * torch.randn(W, B))
    rise = rise.where(torch.rand(W, B) < 0.8, -rise / 4) * torch.exp(tau * torch.randn(W, 1))
    return rise.masked_fill(torch.rand(W, B) < saturated, 0.0)


def digits(W: int, B: int, shards: str) -> Tensor:
    """Each rank draws from one recorded rank's rises, 32 of the third epoch, jittered by 1% lest it draw ties."""
    with (RESULTS / "coordination_scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["shards"] == shards and row["epoch"] == "3"]
    recorded = torch.tensor([float(row["rise"]) for row in rows]).view(-1, 32)
    drawn = recorded[torch.randint(len(recorded), (W, 1)), torch.randint(32, (W, B))]
    return drawn * (1.0 + 0.01 * torch.randn(W, B))


SCORES: dict[str, Draw] = {
    "alike ranks": partial(mixture, tau=0.0),
    "rank effect 0.5": partial(mixture, tau=0.5),
    "rank effect 1": partial(mixture, tau=1.0),
    "rank effect 2": partial(mixture, tau=2.0),
    "60% zero, rank effect 0.5": partial(mixture, tau=0.5, saturated=0.6),
    "digits, shuffled": partial(digits, shards="shuffled"),
    "digits, two classes a rank": partial(digits, shards="two classes"),
}


def num_trials(W: int) -> int:
    """Fewer where each one averages over more ranks."""
    return max(3, min(40, 640 // W))


# stragglers


def simulate_stragglers(B: int) -> list[Row]:
    """Of every distribution, number of ranks, gamma and capacity: means over trials.

    Besides, two rules that were not taken: overflow dropped, and equal scores kept in the order of ranks.
    """
    rows: list[Row] = []
    for name, draw in SCORES.items():
        for W in NUM_RANKS:
            tables = [draw(W, B) for _ in range(num_trials(W))]
            for gamma in (0.25, 0.5):
                exact = [selection.select(scores_WB, gamma) for scores_WB in tables]
                for factor in FACTORS:
                    most = None if factor == math.inf else selection.capacity(gamma, B, factor)
                    kept = [selection.select(scores_WB, gamma, most) for scores_WB in tables]
                    rows.append(compare(tables, exact, kept, gamma) | _keys(name, W, B, gamma, factor, "passed on"))
                    if factor in (1.25, 1.5):
                        kept = [drop_overflow(*both, most or B) for both in zip(tables, exact, strict=True)]
                        rows.append(compare(tables, exact, kept, gamma) | _keys(name, W, B, gamma, factor, "dropped"))
                tilted = [scores_WB - 1e-12 * torch.arange(W).unsqueeze(1) for scores_WB in tables]
                kept = [selection.select(scores_WB, gamma) for scores_WB in tilted]
                keys = _keys(name, W, B, gamma, math.inf, "ties to the first ranks")
                rows.append(compare(tables, exact, kept, gamma) | keys)
    return rows


def drop_overflow(scores_WB: Tensor, kept_WB: Tensor, capacity: int) -> Tensor:
    """The rule that was not taken: the exact choice, less what exceeds the capacity of a rank."""
    place_WB = scores_WB.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return kept_WB & (place_WB < capacity)


def compare(tables: list[Tensor], exact: list[Tensor], kept: list[Tensor], gamma: float) -> Row:
    """What a choice costs and what it misses of the exact one.

    step_inflation: of a paper step at beta 0.5 (ascent 2.5, scoring 1, descent 3 gamma), with the descent's.
    rise_kept: sum of the kept rises over the exact choice's.
    """
    inflation = _mean([float(mask.sum(1).max() / mask.sum(1).float().mean()) for mask in kept])
    total = _mean([int(mask.sum()) / int(best.sum()) for mask, best in zip(kept, exact, strict=True)])
    slowest = inflation * total
    return {
        "descent_inflation": inflation,
        "step_inflation": (3.5 + 3 * gamma * slowest) / (3.5 + 3 * gamma),
        "kept_of_wanted": total,
        "missed_share": _mean(
            [int((best & ~mask).sum()) / int(best.sum()) for mask, best in zip(kept, exact, strict=True)]
        ),
        "rise_kept": _mean(
            [
                float(scores_WB[mask].sum() / scores_WB[best].sum())
                for scores_WB, mask, best in zip(tables, kept, exact, strict=True)
            ]
        ),
    }


def _keys(name: str, W: int, B: int, gamma: float, factor: float, overflow: str) -> Row:
    return {"scores": name, "W": W, "B": B, "gamma": gamma, "capacity_factor": factor, "overflow": overflow}


# the error of quantiles


def simulate_thresholds(B: int) -> list[Row]:
    """The choice by quantiles against the exact one under the same capacity."""
    rows: list[Row] = []
    for name, draw in SCORES.items():
        for W in (2, 8, 64, 256, 1024):
            tables = [draw(W, B) for _ in range(max(3, num_trials(W) // 2))]
            for gamma, factor in ((0.25, 1.25), (0.5, 1.25), (0.5, math.inf)):
                most = None if factor == math.inf else selection.capacity(gamma, B, factor)
                exact = [selection.select(scores_WB, gamma, most) for scores_WB in tables]
                for Q in (4, 8, 16, 32):
                    for rule in (by_threshold, by_allotment):
                        kept = [rule(scores_WB, gamma, Q, most) for scores_WB in tables]
                        keys: Row = {
                            "rule": rule.__name__,
                            "Q": Q,
                            "bound": error_bound(W, B, Q, most, gamma, "zero" in name),
                        }
                        keys |= errors(tables, exact, kept)
                        rows.append(_keys(name, W, B, gamma, factor, "passed on") | keys)
    return rows


def by_threshold(scores_WB: Tensor, gamma: float, num_quantiles: int, capacity: int | None) -> Tensor:
    """The transport `thresholds`, all ranks at once."""
    gathered = _quantiles(scores_WB, num_quantiles, capacity)
    threshold = selection.shared_threshold(gathered, gamma, scores_WB.shape[1], capacity)
    kept: Tensor = torch.vmap(partial(selection.select_above, threshold=threshold, capacity=capacity))(scores_WB)
    return kept


def by_allotment(scores_WB: Tensor, gamma: float, num_quantiles: int, capacity: int | None) -> Tensor:
    """The same quantiles, read otherwise: scores interpolated between them tell every rank how many it shall keep.

    The total is then known beforehand, without a second collective; the ranks' thresholds differ a little.
    """
    W, B = scores_WB.shape
    limit = B if capacity is None else min(B, capacity)
    gathered = _quantiles(scores_WB, num_quantiles, capacity)
    place = selection._places(limit, num_quantiles, scores_WB.device)[1:-1]
    extra = torch.arange(1, limit)
    right = torch.searchsorted(place, extra).clamp(max=num_quantiles - 1)
    left = (right - 1).clamp(min=0)
    weight = ((extra - place[left]) / (place[right] - place[left]).clamp(min=1)).clamp(0.0, 1.0)
    guess = torch.lerp(gathered[:, left], gathered[:, right], weight.double())
    wanted = selection.num_kept(gamma, W * B, at_least=W, at_most=W * limit) - W
    best = guess.T.flatten().argsort(descending=True, stable=True)[:wanted]
    number_W = 1 + torch.bincount(best % W, minlength=W)
    place_WB = scores_WB.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return place_WB < number_W.unsqueeze(1)


def _quantiles(scores_WB: Tensor, num_quantiles: int, capacity: int | None) -> Tensor:
    gathered: Tensor = torch.vmap(partial(selection.quantiles, num_quantiles=num_quantiles, capacity=capacity))(
        scores_WB
    )
    return gathered


def error_bound(W: int, B: int, num_quantiles: int, capacity: int | None, gamma: float, ties: bool) -> float:
    """The bound of `shared_threshold` on the error of the total, as a share of it; `ties`: ranks hold equal scores."""
    gap = math.ceil((capacity or B) / (num_quantiles + 1))
    jump = W * gap if ties else gap
    return (W * (gap - 1) + jump) // 2 / selection.num_kept(gamma, W * B, at_least=W)


def errors(tables: list[Tensor], exact: list[Tensor], kept: list[Tensor]) -> Row:
    """total_error: of the number kept, as a share; its mean is the bias of weights that took it for exact.

    differing_share: samples kept by one choice only, over those kept by both choices, counted twice.
    mean_rise: of a kept sample, over the exact choice's.
    """
    totals = [int(mask.sum()) / int(best.sum()) - 1.0 for mask, best in zip(kept, exact, strict=True)]
    differing = [
        int((mask ^ best).sum()) / int(mask.sum() + best.sum()) for mask, best in zip(kept, exact, strict=True)
    ]
    rises = [
        float(scores_WB[mask].mean() / scores_WB[best].mean())
        for scores_WB, mask, best in zip(tables, kept, exact, strict=True)
    ]
    return {
        "total_error_mean": _mean(totals),
        "total_error_absolute": _mean([abs(total) for total in totals]),
        "total_error_largest": max(abs(total) for total in totals),
        "differing_share": _mean(differing),
        "mean_rise": _mean(rises),
    }


# transport: a model


class Network(NamedTuple):
    """Constants of an alpha-beta model. Assumptions, not measurements.

    Launch and hops of the NCCL classes: NCCL 2.2x, src/graph/tuning.cc, protocol LL (small messages), which takes
    base 6.6 us, NVLink 0.6 us and network 2.7 us a hop of a ring. TCP: 30 us a hop, as of a socket's round trip.
    Bandwidths: of the link, one way, halved for LL, which sends a flag with every word.
    """

    name: str
    launch: float
    """Seconds that any collective takes to begin."""
    hop: float
    """Seconds from rank to rank on different nodes (or, on a single node, within it)."""
    hop_within: float
    bandwidth: float
    """Bytes a second and rank, one way."""
    ranks_per_node: int
    most_ranks: int = 1024


NETWORKS = [
    Network("NVLink 4 (one domain)", 6.6e-6, 0.6e-6, 0.6e-6, 450e9 / 2, 64, most_ranks=64),
    Network("InfiniBand NDR, 8 GPUs a node", 6.6e-6, 2.7e-6, 0.6e-6, 50e9 / 2, 8),
    Network("25 GbE over TCP, 1 GPU a node", 20e-6, 30e-6, 30e-6, 3.1e9, 1),
]


def ring_seconds(network: Network, W: int, num_bytes: int) -> float:
    """All-gather of `num_bytes` per rank: W - 1 hops, each carrying one rank's bytes."""
    across = max(0, W // network.ranks_per_node - 1)
    hops = across * network.hop + (W - 1 - across) * network.hop_within
    return network.launch + hops + (W - 1) * num_bytes / network.bandwidth


def tree_seconds(network: Network, W: int, num_bytes: int) -> float:
    """The same by recursive doubling, log2 W hops: what NCCL's PAT and MPI come near to, not what a ring does."""
    within = math.log2(min(W, network.ranks_per_node))
    hops = within * network.hop_within + (math.log2(W) - within) * network.hop
    return network.launch + hops + (W - 1) * num_bytes / network.bandwidth


def model_transport() -> list[Row]:
    """`scores`: 4 bytes a sample. `thresholds`: 8 a quantile (Q = 16), and the total's all-reduce, twice the hops."""
    rows: list[Row] = []
    for network in NETWORKS:
        for W in (W for W in NUM_RANKS if network.most_ranks >= W):
            # The total: eight bytes, reduced and spread, always by a tree.
            total = 2 * tree_seconds(network, W, 8) - network.launch
            for algorithm, seconds in (("ring", ring_seconds), ("tree", tree_seconds)):
                row = partial(_transport_row, network, algorithm, W)
                rows += [row("scores", B, 4 * B, seconds(network, W, 4 * B), 0.0) for B in (32, 64, 256, 1024)]
                rows.append(row("thresholds", 0, 128, seconds(network, W, 128), total))
    return rows


def _transport_row(
    network: Network, algorithm: str, W: int, transport: str, B: int, num_bytes: int, exposed: float, hidden: float
) -> Row:
    keys: Row = {"network": network.name, "algorithm": algorithm, "W": W, "transport": transport, "B": B or "any"}
    return keys | {
        "bytes_sent_per_rank": num_bytes,
        "bytes_received_per_rank": num_bytes * (W - 1),
        "exposed_microseconds": exposed * 1e6,
        "hidden_microseconds": hidden * 1e6,
    }


def measure_compute() -> list[Row]:
    """Seconds of the choice itself on one core: medians of 5; on a GPU not measured."""
    rows: list[Row] = []
    for W in (8, 64, 1024):
        scores_WB = mixture(W, 64, 0.5)
        gathered = _quantiles(scores_WB, 16, 40)

        def thresholds(scores_WB: Tensor = scores_WB, gathered: Tensor = gathered) -> None:
            selection.quantiles(scores_WB[0], 16, 40)
            selection.select_above(scores_WB[0], selection.shared_threshold(gathered, 0.5, 64, 40), 40)

        for name, work in (("scores", partial(selection.select, scores_WB, 0.5, 40)), ("thresholds", thresholds)):
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
            rows.append({"W": W, "B": 64, "transport": name, "microseconds": sorted(seconds)[2] * 1e6})
    return rows


# figures


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
        axis.set_ylabel("samples kept, slowest / mean rank")
    for axis in [*axes[1, :3], axes[0, 3]]:
        axis.set_xlabel("ranks")
        axis.tick_params(labelbottom=True)
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=12)
    figure.suptitle("Straggler inflation of the descent pass; gamma 0.5, 64 samples a rank")
    figure.savefig(RESULTS / "coordination_straggler.png", dpi=110)


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
    figure.savefig(RESULTS / "coordination_overflow.png", dpi=110)


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
    figure.savefig(RESULTS / "coordination_thresholds.png", dpi=110)


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
    figure.savefig(RESULTS / "coordination_transport.png", dpi=110)


def _pick(rows: list[Row], **keys: str | int | float) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def _column(rows: list[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def write(name: str, rows: list[Row]) -> None:
    """One CSV of `rows`, numbers to five digits."""
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def main() -> None:
    """Everything, seeded."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap over ranks, which is ours here
    start = time.perf_counter()
    stragglers = simulate_stragglers(64)
    write("coordination_straggler.csv", stragglers)
    plot_stragglers(stragglers)
    plot_overflow(stragglers)
    print(f"stragglers {time.perf_counter() - start:.0f} s")
    thresholds = simulate_thresholds(64)
    write("coordination_thresholds.csv", thresholds)
    plot_thresholds(thresholds)
    print(f"thresholds {time.perf_counter() - start:.0f} s")
    transport = model_transport()
    write("coordination_transport.csv", transport)
    plot_transport(transport)
    for row in measure_compute():
        print("choice on one core:", row)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
