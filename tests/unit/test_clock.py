"""The clock of phases, by a time that the test holds in its hand."""

import time

import pytest
import torch

from esam_dist.clock import PhaseClock


@pytest.fixture
def now(monkeypatch):
    hand = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: hand[0])
    return hand


def test_each_phase_lasts_from_the_stamp_before(now):
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(2):
        clock.start()
        now[0] += 1.0
        clock.end("data")
        now[0] += 2.5
        clock.end("ascent")
    assert clock.drain() == {"data": [1.0, 1.0], "ascent": [2.5, 2.5]}


def test_time_between_an_end_and_the_next_start_counts_nowhere(now):
    clock = PhaseClock(torch.device("cpu"))
    clock.start()
    now[0] += 1.0
    clock.end("data")
    now[0] += 50.0
    clock.start()
    now[0] += 2.0
    clock.end("data")
    assert clock.drain() == {"data": [1.0, 2.0]}


def test_a_drained_stamp_is_not_counted_again(now):
    clock = PhaseClock(torch.device("cpu"))
    clock.start()
    now[0] += 1.0
    clock.end("data")
    assert clock.drain() == {"data": [1.0]}
    assert clock.drain() == {}
    now[0] += 3.0
    clock.end("ascent")
    assert clock.drain() == {"ascent": [3.0]}
