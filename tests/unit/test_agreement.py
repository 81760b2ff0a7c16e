"""What all ranks learn alike: a stop, and what rank 0 tells; about ten times a second, or in every slow round."""

import pytest

from esam_dist import agreement
from esam_dist.agreement import Agreement, Stopped
from esam_dist.ranks import Ranks


class Paired(Ranks):
    """One of two ranks; `other` is what the other one adds."""

    other = ()

    def sum_(self, tensor):
        for place, value in enumerate(self.other):
            tensor[place] += value
        return tensor


@pytest.fixture
def clock(monkeypatch):
    """The time, which moves only by hand."""
    now = [100.0]
    monkeypatch.setattr(agreement.time, "monotonic", lambda: now[0])
    return now


def rounds_until_next(agreed, clock, seconds):
    """After how many rounds of so many seconds the ranks speak again."""
    count = 0
    while True:
        clock[0] += seconds
        count += 1
        if agreed.round(lambda: [7.0]) is not None:
            return count


def test_slow_rounds_all_count_and_fast_ones_are_few_collectives(clock):
    agreed = Agreement(Ranks(), lambda: False)
    assert [rounds_until_next(agreed, clock, 5.0) for _ in range(3)] == [1, 1, 1]
    assert rounds_until_next(agreed, clock, 0.002) == 1
    assert rounds_until_next(agreed, clock, 0.002) in (49, 50)
    assert rounds_until_next(agreed, clock, 0.05) in (49, 50)
    assert rounds_until_next(agreed, clock, 0.05) in (1, 2)
    assert rounds_until_next(agreed, clock, 0.2) in (1, 2)
    assert rounds_until_next(agreed, clock, 0.2) == 1


def test_no_clock_of_its_own_decides_on_another_rank(clock):
    second = Paired(rank=1, world_size=2)
    agreed = Agreement(second, lambda: False)
    second.other = (0.0, 0.01, 3.0)
    assert agreed.round(lambda: [99.0]) == [3.0]
    # Rank 0 says that a round takes 10 ms, so there are ten; this rank's clock says a minute.
    assert rounds_until_next(agreed, clock, 60.0) == 10


@pytest.mark.parametrize("who", ["this rank", "another"])
def test_all_know_when_one_wants_to_stop(who):
    ranks = Paired(rank=0, world_size=2)
    agreed = Agreement(ranks, lambda: who == "this rank")
    ranks.other = (float(who == "another"), 0.0)
    assert not agreed.stops
    with pytest.raises(Stopped):
        agreed.round_or_stop()
    assert agreed.stops


def test_clock_that_stands_still_is_no_division_by_zero(clock):
    agreed = Agreement(Ranks(), lambda: False)
    assert agreed.round() == []
    assert [agreed.round() for _ in range(agreement.MOST_ROUNDS - 1)] == [None] * (agreement.MOST_ROUNDS - 1)
    assert agreed.round() == []
