"""Which samples are kept: exact counts on every input, against a plain Python sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from esam_dist.step import selection
from tests.scores import FRACTIONS, above_threshold, capacities, ordered, reference, some, tables

# select: the exact choice


@some
@given(tables(), FRACTIONS, capacities())
def test_select_agrees_with_a_plain_sort(scores_WB: Tensor, fraction: float, capacity: int | None) -> None:
    assert selection.select(scores_WB, fraction, capacity).tolist() == reference(scores_WB, fraction, capacity)


@some
@given(tables(), FRACTIONS, capacities())
def test_the_number_kept_depends_on_shapes_alone(scores_WB: Tensor, fraction: float, capacity: int | None) -> None:
    W, B = scores_WB.shape
    limit = B if capacity is None else min(B, capacity)
    kept_WB = selection.select(scores_WB, fraction, capacity)
    assert int(kept_WB.sum()) == selection.num_kept(fraction, W * B, at_least=W, at_most=W * limit)
    assert int(kept_WB.sum(1).min()) >= 1
    assert int(kept_WB.sum(1).max()) <= limit


@some
@given(tables(), FRACTIONS, capacities())
def test_no_sample_left_out_beats_one_kept_unless_its_rank_is_full(
    scores_WB: Tensor, fraction: float, capacity: int | None
) -> None:
    """Exchanging a kept for a left-out sample never gains: for these bounds (a matroid) that makes the sum maximal."""
    W, B = scores_WB.shape
    limit = B if capacity is None else min(B, capacity)
    kept_WB = selection.select(scores_WB, fraction, capacity)
    number = kept_WB.sum(1).tolist()
    scores = [[ordered(score) for score in row] for row in scores_WB.tolist()]
    worst_kept = [
        min(score for score, keep in zip(*row, strict=True) if keep) for row in zip(scores, kept_WB, strict=True)
    ]
    best_left = [
        max((score for score, keep in zip(*row, strict=True) if not keep), default=-math.inf)
        for row in zip(scores, kept_WB, strict=True)
    ]
    for gives in range(W):
        for takes in range(W):
            if gives == takes or (number[gives] > 1 and number[takes] < limit):
                assert best_left[takes] <= worst_kept[gives]


@some
@given(tables(), FRACTIONS, capacities(), st.randoms())
def test_renaming_ranks_renames_the_choice(
    scores_WB: Tensor, fraction: float, capacity: int | None, random: object
) -> None:
    """With distinct scores; of equal scores, the order of ranks decides who keeps the last."""
    scores_WB = torch.randn(scores_WB.shape, generator=torch.Generator().manual_seed(scores_WB.numel()))
    order = list(range(len(scores_WB)))
    random.shuffle(order)  # type: ignore[attr-defined]
    kept_WB = selection.select(scores_WB, fraction, capacity)
    assert torch.equal(selection.select(scores_WB[order], fraction, capacity), kept_WB[order])


@some
@given(st.integers(1, 40), st.integers(1, 40), FRACTIONS)
def test_equal_scores_are_shared_evenly_among_ranks(W: int, B: int, fraction: float) -> None:
    number_W = selection.select(torch.zeros(W, B), fraction).sum(1)
    assert int(number_W.max() - number_W.min()) <= 1


@some
@given(tables(), FRACTIONS)
def test_samples_that_are_nan_are_kept_last(scores_WB: Tensor, fraction: float) -> None:
    kept_WB = selection.select(scores_WB, fraction)
    left_out = ~kept_WB & ~scores_WB.isnan()
    nan_kept_W = (kept_WB & scores_WB.isnan()).sum(1)
    # A rank of NaN alone keeps one all the same.
    assert not left_out.any() or bool((nan_kept_W <= scores_WB.isnan().all(1)).all())


def test_one_sample_is_kept_of_one_rank_at_the_smallest_gamma() -> None:
    assert selection.select(torch.tensor([[0.1, 0.3, 0.2]]), 1e-9).tolist() == [[False, True, False]]


def test_a_thousand_ranks_of_one_sample_keep_them_all() -> None:
    assert selection.select(torch.randn(1024, 1), 0.1).all()


def test_overflow_of_a_full_rank_goes_to_the_next_best_samples_of_the_other() -> None:
    scores_WB = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 4.0, 2.0, 3.0]])
    assert selection.select(scores_WB, 0.5).tolist() == [[True, True, True, False], [False, True, False, False]]
    assert selection.select(scores_WB, 0.5, 2).tolist() == [[True, True, False, False], [False, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_every_float_type_are_ranked(dtype: torch.dtype) -> None:
    scores_WB = torch.tensor([[3.0, math.nan, 1.0], [math.inf, 2.0, -math.inf]], dtype=dtype)
    assert selection.select(scores_WB, 0.5).tolist() == [[True, False, False], [True, True, False]]
    above = selection.shared_threshold(torch.stack([selection.quantiles(row, 2) for row in scores_WB]), 0.5, 3)
    assert [selection.select_above(row, above).tolist() for row in scores_WB] == [
        [True, False, False],
        [True, True, False],
    ]


def test_the_scores_given_are_left_alone() -> None:
    scores_WB = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    before = scores_WB.clone()
    selection.select(scores_WB, 0.5, 1)
    selection.select_above(scores_WB[0], selection.quantiles(scores_WB[0], 1)[0])
    assert torch.equal(scores_WB, before)


def test_threshold_is_the_smallest_score_kept() -> None:
    scores_WB = torch.tensor([[5.0, 1.0, 3.0], [2.0, 4.0, 0.0]])
    assert float(selection.threshold(scores_WB, selection.select(scores_WB, 0.5))) == 3.0


# capacity


@some
@given(FRACTIONS, st.integers(1, 512), st.integers(1, 64), st.floats(1.0, 4.0))
def test_capacity_leaves_the_total_as_it_is(fraction: float, B: int, W: int, factor: float) -> None:
    most = selection.capacity(fraction, B, factor)
    assert 1 <= most <= B
    assert selection.num_kept(fraction, W * B, W, W * most) == selection.num_kept(fraction, W * B, W)


def test_capacity_is_not_raised_by_the_rounding_of_a_product() -> None:
    assert selection.capacity(0.07, 100, 1.0) == 7


@pytest.mark.parametrize("factor", [0.99, 0.0, -1.0, math.nan])
def test_a_capacity_factor_below_one_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="capacity factor"):
        selection.capacity(0.5, 64, factor)


def test_a_capacity_below_one_is_refused() -> None:
    scores_WB = torch.zeros(2, 3)
    for refused in (
        lambda: selection.select(scores_WB, 0.5, 0),
        lambda: selection.quantiles(scores_WB[0], 2, 0),
        lambda: selection.select_above(scores_WB[0], scores_WB[0, 0], 0),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            refused()


# on the device


def test_nothing_asks_the_device_for_a_number() -> None:
    """Fake tensors hold no data: whatever needs a value on the host raises."""
    with FakeTensorMode():
        scores_WB = torch.randn(4, 8)
        kept_WB = selection.select(scores_WB, 0.5, 5)
        selection.threshold(scores_WB, kept_WB)
        gathered_WQ = torch.stack([selection.quantiles(row, 3, 5) for row in scores_WB])
        threshold = selection.shared_threshold(gathered_WQ, 0.5, 8, 5)
        assert selection.select_above(scores_WB[0], threshold, 5).shape == (8,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_chooses_like_the_cpu_without_waiting() -> None:
    scores_WB = torch.randn(16, 64).round(decimals=1)
    on_device = scores_WB.cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept_WB = selection.select(on_device, 0.25, 24)
        above_WB = above_threshold(on_device, 0.25, 8, 24)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(kept_WB.cpu(), selection.select(scores_WB, 0.25, 24))
    assert torch.equal(above_WB.cpu(), above_threshold(scores_WB, 0.25, 8, 24))
