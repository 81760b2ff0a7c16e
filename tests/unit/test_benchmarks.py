"""What the benchmarks report: the rules that they simulate are the program's, and their arithmetic is right."""

from __future__ import annotations

import ast
import csv
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.coordination.draws import RESULTS, mixture
from benchmarks.coordination.network import NETWORKS, model_transport
from benchmarks.coordination.rules import (
    by_allotment,
    by_threshold,
    compare,
    drop_overflow,
    error_bound,
    errors,
    quantiles_of_ranks,
)
from benchmarks.step_cost.report import summarise, to_sgd
from docs.tables import pages
from esam_dist.step import selection
from tests.scores import FRACTIONS, above_threshold, capacities, some, tables

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SOURCES = sorted(BENCHMARKS.rglob("*.py"))


def reaches(tree: ast.AST) -> Iterator[str]:
    """Where the code goes past what our modules offer: their private names, the module path, the tests."""
    ours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("esam_dist", "benchmarks"):
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tests":
            yield str(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if ast.unparse(node) == "sys.path" or (node.value.id in ours and node.attr.startswith("_")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self.") and node.attr.startswith("_"):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_a_benchmark_uses_only_what_the_package_offers(path: Path) -> None:
    assert list(reaches(ast.parse(path.read_text()))) == []


def test_every_benchmark_that_the_pages_name_is_there() -> None:
    texts = [path.read_text() for path in [*pages(), *SOURCES]]
    named = set(re.findall(r"python -m (benchmarks[\w.]*\w)", "\n".join(texts)))
    assert "benchmarks.step_cost.phases" in named
    assert [name for name in sorted(named) if importlib.util.find_spec(name) is None] == []


def test_every_result_lies_beside_the_benchmark_that_wrote_it() -> None:
    rooms = {path.parent for path in BENCHMARKS.rglob("__main__.py")} - {BENCHMARKS}
    results = [path for path in BENCHMARKS.rglob("*") if path.suffix in (".csv", ".md", ".png")]
    assert results
    assert {path.parent for path in results} <= {room / "results" for room in rooms}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over ranks, as the benchmark's main has it
@some
@given(tables(), FRACTIONS, st.integers(1, 20), capacities())
def test_the_simulated_thresholds_are_those_of_the_program(
    scores_WB: Tensor, fraction: float, num_quantiles: int, capacity: int | None
) -> None:
    gathered = quantiles_of_ranks(scores_WB, num_quantiles, capacity)
    alone = torch.stack([selection.quantiles(row, num_quantiles, capacity) for row in scores_WB])
    assert torch.equal(gathered, alone)
    simulated = by_threshold(scores_WB, fraction, num_quantiles, capacity)
    assert torch.equal(simulated, above_threshold(scores_WB, fraction, num_quantiles, capacity))


@pytest.mark.parametrize("capacity", [None, 10])
def test_the_rules_that_were_not_taken_are_what_they_are_called(capacity: int | None) -> None:
    torch.manual_seed(0)
    scores_WB = mixture(4, 16, tau=1.0)
    exact = selection.select(scores_WB, 0.5)
    dropped = drop_overflow(scores_WB, exact, 10)
    for row, mask, was in zip(scores_WB, dropped, exact, strict=True):
        best = row.argsort(descending=True)[: min(10, int(was.sum()))]
        assert sorted(mask.nonzero().flatten().tolist()) == sorted(best.tolist())
    # Allotment keeps the exact total, of every rank its best, and with all quantiles the exact choice.
    assert int(by_allotment(scores_WB, 0.5, 4, capacity).sum()) == 32
    assert torch.equal(by_allotment(scores_WB, 0.5, 15, capacity), selection.select(scores_WB, 0.5, capacity))


SCORES = [torch.tensor([[8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0]])]
EXACT = [torch.tensor([[True, True, True, False], [True, False, False, False]])]
EVEN = [torch.tensor([[True, True, False, False], [True, True, False, False]])]


@pytest.mark.parametrize(
    ("kept", "capacity", "descent", "missed", "rise"),
    [(EXACT, None, 1.5, 0.0, 1.0), (EXACT, 4, 2.0, 0.0, 1.0), (EVEN, 2, 1.0, 0.25, 22 / 25)],
)
def test_costs_of_a_choice_are_those_counted_by_hand(kept, capacity, descent, missed, rise):
    row = compare(SCORES, EXACT, kept, 0.5, capacity)
    assert row["descent_inflation"] == descent
    assert row["step_inflation"] == pytest.approx((3.5 + 1.5 * descent) / 5.0)
    assert (row["kept_of_wanted"], row["missed_share"]) == (1.0, missed)
    assert row["rise_kept"] == pytest.approx(rise)


def test_errors_of_a_choice_are_those_counted_by_hand():
    fewer = [torch.tensor([[True, True, False, False], [True, False, False, False]])]
    row = errors(SCORES, EXACT, fewer)
    assert (row["total_error_mean"], row["total_error_absolute"]) == (-0.25, 0.25)
    assert row["differing_share"] == pytest.approx(1 / 7)
    assert row["mean_rise"] == pytest.approx((19 / 3) / (25 / 4))


@pytest.mark.parametrize(
    ("capacity", "ties", "samples"),
    # Gaps of ceil(64 / 17) = 4 and ceil(40 / 17) = 3; 256 samples of 8 ranks are wanted.
    [(None, False, (8 * 3 + 4) // 2), (40, False, (8 * 2 + 3) // 2), (40, True, (8 * 2 + 8 * 3) // 2)],
)
def test_the_bound_is_that_of_the_shared_threshold(capacity, ties, samples):
    assert error_bound(8, 64, 16, capacity, 0.5, ties) == samples / 256


def test_the_network_carries_the_bytes_that_the_program_sends():
    rows = model_transport()
    assert all(row["bytes_given_per_rank"] == torch.rand(row["B"]).nbytes for row in rows if row["B"] != "any")
    sent = selection.quantiles(torch.rand(64), 16).nbytes
    assert {row["bytes_given_per_rank"] for row in rows if row["transport"] == "thresholds"} == {sent}
    for row in rows:
        W, given_bytes = row["W"], row["bytes_given_per_rank"]
        ring = sum(given_bytes for _ in range(W - 1))
        doubling = sum(given_bytes * 2**hop for hop in range(round(math.log2(W))))
        assert row["bytes_sent_per_rank"] == (ring if row["algorithm"] == "ring" else doubling)


def test_latency_is_launch_and_hops_and_bytes():
    nodes = next(network for network in NETWORKS if network.ranks_per_node == 8)
    row = next(
        row
        for row in model_transport()
        if (row["network"], row["W"], row["B"], row["algorithm"]) == (nodes.name, 16, 64, "ring")
    )
    # Of 15 hops one leads to the other node.
    expected = nodes.launch + nodes.hop + 14 * nodes.hop_within + 15 * 256 / nodes.bandwidth
    assert row["exposed_microseconds"] == pytest.approx(1e6 * expected)


@pytest.mark.parametrize(
    ("scores", "gamma", "first"),
    [
        *(("digits, shuffled", 0.5, 8), ("digits, two classes a rank", 0.5, 4), ("alike ranks", 0.5, 64)),
        *(("60% zero, rank effect 0.5", 0.5, None), ("digits, shuffled", 0.25, 4), ("alike ranks", 0.25, 8)),
    ],
)
def test_a_capacity_pays_from_as_many_ranks_on_as_the_documentation_says(scores, gamma, first):
    with (RESULTS / "straggler.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["scores"], float(row["gamma"]), row["overflow"]) == (scores, gamma, "passed on")
        ]
    cost = {(int(row["W"]), float(row["capacity_factor"])): float(row["step_inflation"]) for row in rows}
    padded = (3.5 + 3 * gamma * 1.25) / (3.5 + 3 * gamma)
    assert all(cost[W, 1.25] == pytest.approx(padded, abs=1e-4) for W, _ in cost)
    pays = [W for W, factor in cost if factor == math.inf and cost[W, factor] > cost[W, 1.25]]
    assert (pays[0] if pays else None) == first


def timed(mode: str, seconds: float) -> dict[str, str]:
    return {"model": "m", "repetition": "0", "mode": mode, "wall": str(seconds), "cpu": str(2 * seconds)}


def test_a_step_is_compared_with_the_mean_of_the_steps_of_sgd_beside_it():
    steps = [("sgd", 2), ("sam", 3), ("esam", 6), ("sgd", 4), ("gsam", 5), ("sgd", 6)]
    times = [timed(*row) for row in steps]
    others = [("sam", 1.0), ("esam", 2.0), ("gsam", 1.0)]
    for clock in ("wall", "cpu"):
        assert list(to_sgd(times, clock)) == [*others, ("sgd", 0.5), ("sgd", 1.0), ("sgd", 1.5)]
    # Stopped in the middle: no step of SGD behind the last.
    stopped = [*times, timed("sam", 99)]
    assert list(to_sgd(stopped, "wall")) == list(to_sgd(times, "wall"))
    assert list(to_sgd(times[:2], "wall")) == []


def test_a_summary_has_the_median_over_repetitions_and_counts_beside_sgd():
    times = []
    for repetition, seconds in enumerate((1.0, 3.0, 2.0)):
        rows = [timed("sgd", 1.0), timed("sam", seconds), timed("sgd", 1.0)]
        times += [row | {"repetition": str(repetition)} for row in rows]
    counts = [
        {"model": "m", "mode": mode, "flops_per_sample": flops, "peak_bytes": peak, "traffic_bytes": "7"}
        for mode, flops, peak in (("sgd", "10", "100"), ("sam", "20", "150"))
    ]
    sgd, sam = summarise(times, counts)
    assert (sgd["flop_ratio"], sgd["wall_median"], sgd["extra_memory_bytes"]) == (1.0, 1.0, 0)
    assert (sam["flop_ratio"], sam["wall_median"], sam["wall_mean"], sam["steps"]) == (2.0, 2.0, 2.0, 3)
    assert (sam["wall_q1"], sam["wall_q3"], sam["extra_memory_bytes"]) == (1.5, 2.5, 50)
