"""The choice by quantiles: within its bound of the exact one, on every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esam_dist.step import selection
from tests.scores import FRACTIONS, above_threshold, capacities, many, reference, some, tables


def bound(W: int, B: int, num_quantiles: int, capacity: int | None, jump: int) -> int:
    """The docstring's: (W * (g - 1) + j) / 2, with j = `jump` * g."""
    limit = B if capacity is None else min(B, capacity)
    gap = math.ceil(limit / (num_quantiles + 1))
    return (W * (gap - 1) + jump * gap) // 2


@many
@given(tables(), FRACTIONS, st.integers(1, 30), capacities())
def test_thresholds_keep_what_they_should_to_within_the_bound(
    scores_WB: Tensor, fraction: float, num_quantiles: int, capacity: int | None
) -> None:
    W, B = scores_WB.shape
    limit = B if capacity is None else min(B, capacity)
    kept_WB = above_threshold(scores_WB, fraction, num_quantiles, capacity)
    assert int(kept_WB.sum(1).min()) >= 1
    assert int(kept_WB.sum(1).max()) <= limit
    error = abs(int(kept_WB.sum()) - selection.num_kept(fraction, W * B, at_least=W, at_most=W * limit))
    assert error <= bound(W, B, num_quantiles, capacity, jump=W) < W * math.ceil(limit / (num_quantiles + 1))


@many
@given(st.integers(1, 12), st.integers(1, 40), FRACTIONS, st.integers(1, 40), capacities(50), st.integers(0, 999))
def test_thresholds_meet_the_tighter_bound_where_no_scores_are_equal(
    W: int, B: int, fraction: float, num_quantiles: int, capacity: int | None, seed: int
) -> None:
    scores_WB = torch.randperm(W * B, generator=torch.Generator().manual_seed(seed)).float().view(W, B)
    kept_WB = above_threshold(scores_WB, fraction, num_quantiles, capacity)
    error = abs(int(kept_WB.sum()) - int(selection.select(scores_WB, fraction, capacity).sum()))
    assert error <= bound(W, B, num_quantiles, capacity, jump=1)


@some
@given(st.integers(1, 12), st.integers(1, 24), FRACTIONS, capacities(), st.integers(0, 99), st.integers(0, 999))
def test_thresholds_are_exact_with_a_quantile_for_every_sample(
    W: int, B: int, fraction: float, capacity: int | None, more: int, seed: int
) -> None:
    scores_WB = torch.randperm(W * B, generator=torch.Generator().manual_seed(seed)).float().view(W, B)
    num_quantiles = max(1, (B if capacity is None else min(B, capacity)) - 1) + more
    kept_WB = above_threshold(scores_WB, fraction, num_quantiles, capacity)
    assert torch.equal(kept_WB, selection.select(scores_WB, fraction, capacity))


@some
@given(tables(max_ranks=1), FRACTIONS, capacities())
def test_one_rank_with_all_its_quantiles_is_exact_on_any_scores(
    scores_WB: Tensor, fraction: float, capacity: int | None
) -> None:
    kept_WB = above_threshold(scores_WB, fraction, scores_WB.shape[1], capacity)
    assert kept_WB.tolist() == reference(scores_WB, fraction, capacity)


def adversaries(W: int, B: int, num_quantiles: int) -> dict[str, Tensor]:
    """Tables on which a threshold does badly: blocks out of step, all ranks alike, one rank with everything."""
    falling_B = -torch.arange(B, dtype=torch.float32)
    block = math.ceil(B / (num_quantiles + 1))
    return {
        "all ranks alike": falling_B.repeat(W, 1),
        "all zero": torch.zeros(W, B),
        "all nan": torch.full((W, B), math.nan),
        "half zero": falling_B.clamp(min=-B // 2).repeat(W, 1),
        "one rank high": falling_B.repeat(W, 1) + 1e4 * (torch.arange(W) == W - 1).unsqueeze(1),
        "just below the middle": falling_B.repeat(W, 1).where(torch.arange(B) % block < block // 2, -1e4),
        "disjoint ranks": falling_B - 1e3 * torch.arange(W).unsqueeze(1),
        "one finite": torch.full((W, B), -math.inf).index_fill(1, torch.tensor([B - 1]), 1.0),
    }


@pytest.mark.parametrize("name", list(adversaries(1, 9, 4)))
@pytest.mark.parametrize("capacity", [None, 24])
def test_thresholds_meet_the_bound_on_adversarial_scores(name: str, capacity: int | None) -> None:
    W, B, num_quantiles = 8, 64, 8
    scores_WB = adversaries(W, B, num_quantiles)[name]
    for wanted in range(0, W * B + 1, 5):
        kept_WB = above_threshold(scores_WB, wanted / (W * B), num_quantiles, capacity)
        exact = int(selection.select(scores_WB, wanted / (W * B), capacity).sum())
        assert abs(int(kept_WB.sum()) - exact) <= bound(W, B, num_quantiles, capacity, jump=W)


def test_the_bound_is_all_but_reached() -> None:
    """Every rank's scores break off at its first quantile: half a gap counts that is not there."""
    W, B, num_quantiles = 4, 40, 4
    scores_WB = -torch.arange(W * B, dtype=torch.float32).view(B, W).T
    scores_WB[:, 9:] -= 1e4
    worst = max(
        abs(int(above_threshold(scores_WB, wanted / (W * B), num_quantiles, None).sum()) - wanted)
        for wanted in range(W, W * B + 1)
    )
    assert bound(W, B, num_quantiles, None, jump=1) == 18
    assert worst >= 14


def test_the_lowest_quantile_can_be_the_threshold() -> None:
    """One rank of 40, quantiles at places 8, 16, 24, 32: for 34 samples the last of them serves better than all."""
    assert int(above_threshold(torch.randn(1, 40), 34 / 40, 4, None).sum()) == 33
    assert int(above_threshold(torch.randn(1, 40), 1.0, 4, None).sum()) == 40


def test_quantiles_take_the_same_bytes_whatever_the_batch() -> None:
    for B in (1, 2, 7, 1000):
        assert selection.quantiles(torch.randn(B), 16, capacity=5).shape == (16,)
