"""Schedules against their formulas."""

import math

import pytest

from esam_dist.schedule import LearningRate, Schedule


def test_constant_schedule_is_the_same_always():
    assert [Schedule.constant(0.05)(epoch) for epoch in (0.0, 0.5, 1e6)] == [0.05] * 3


@pytest.mark.parametrize("epoch", [0.0, 1.0, 2.5, 9.99, 10.0, 50.0])
def test_linear_schedule_follows_the_line_and_then_stays(epoch):
    schedule = Schedule.parse({"from": 1.0, "to": 0.4, "epochs": 10})
    assert schedule(epoch) == pytest.approx(1.0 - 0.6 * min(epoch / 10, 1.0))


@pytest.mark.parametrize(
    ("epoch", "value"), [(0.0, 0.1), (4.999, 0.1), (5.0, 0.2), (29.9, 0.2), (30.0, 0.4), (1e6, 0.4)]
)
def test_stepwise_schedule_holds_each_value_until_the_next_epoch_named(epoch, value):
    assert Schedule.parse([[0, 0.1], [5, 0.2], [30, 0.4]])(epoch) == value


def test_stepwise_schedule_holds_its_first_value_before_its_first_epoch():
    assert Schedule.parse([[5, 0.2], [30, 0.4]])(0.0) == 0.2


@pytest.mark.parametrize("form", [0.3, {"from": 1.0, "to": 0.5, "epochs": 10.0}, [[0.0, 1.0], [5.0, 0.5]]])
def test_plain_form_is_parsed_back(form):
    assert Schedule.parse(form).plain() == form
    assert Schedule.parse(Schedule.parse(form)) == Schedule.parse(form)


@pytest.mark.parametrize(
    "form",
    [
        *("0.3", None, True, float("nan"), float("inf"), [], {}, [0, 1], [[0, 1], [0, 2]], [[5, 1], [0, 2]]),
        *([[0, 1, 2]], [[0, "a"]], [[0, True]]),
        *({"from": 1, "to": 0}, {"from": 1, "to": 0, "epochs": 0}, {"from": 1, "to": 0, "epochs": -1}),
        *({"from": 1, "to": "x", "epochs": 3}, {"from": 1, "to": 0, "epochs": 3, "steps": 3}),
    ],
)
def test_anything_else_is_refused(form):
    with pytest.raises(ValueError, match="give a number"):
        Schedule.parse(form)


def test_values_bound_the_schedule():
    schedule = Schedule.parse({"from": 1.0, "to": 0.5, "epochs": 3})
    assert schedule.values() == [1.0, 0.5]
    assert all(0.5 <= schedule(epoch / 7) <= 1.0 for epoch in range(40))


@pytest.mark.parametrize("epoch", [0.0, 0.3, 1.99])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warmup_rises_linearly_from_zero(schedule, epoch):
    rate = LearningRate(peak=0.4, epochs=10, schedule=schedule, warmup_epochs=2.0)(epoch)
    assert rate == pytest.approx(0.4 * epoch / 2.0)


def test_no_update_of_a_warmup_is_made_at_rate_0_and_the_last_has_the_peak():
    # Ten updates an epoch, two epochs of warm-up.
    rate = LearningRate(peak=0.4, epochs=10, schedule="cosine", warmup_epochs=2.0, update_epochs=0.1)
    rates = [rate(update / 10) for update in range(20)]
    assert rates == pytest.approx([0.4 * (update + 1) / 20 for update in range(20)])
    assert LearningRate(peak=0.4, epochs=10, warmup_epochs=0.05, update_epochs=0.1)(0.0) == 0.4


@pytest.mark.parametrize("warmup", [0.0, 2.0])
@pytest.mark.parametrize("epoch", [2.0, 3.7, 9.0, 10.0])
def test_cosine_falls_from_peak_to_zero(epoch, warmup):
    rate = LearningRate(peak=0.4, epochs=10, schedule="cosine", warmup_epochs=warmup)(epoch)
    assert rate == pytest.approx(0.2 * (1 + math.cos(math.pi * (epoch - warmup) / (10 - warmup))), abs=1e-12)


def test_cosine_does_not_rise_again_after_the_end():
    assert LearningRate(peak=0.4, epochs=10, schedule="cosine")(12.0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0.0, 1.0), (2.99, 1.0), (3.0, 0.2), (5.9, 0.2), (6.0, 0.04), (9.0, 0.04)]
)
def test_steps_multiply_at_each_epoch_named(epoch, factor):
    rate = LearningRate(peak=0.4, epochs=10, schedule="step", step_epochs=[3, 6], step_factor=0.2)(epoch)
    assert rate == pytest.approx(0.4 * factor)


def test_constant_rate_stays_at_the_peak():
    assert LearningRate(peak=0.4, epochs=10, schedule="constant", warmup_epochs=1.0)(9.9) == 0.4


def test_warmup_of_the_whole_run_leaves_no_room_for_the_cosine():
    assert LearningRate(peak=0.4, epochs=2, schedule="cosine", warmup_epochs=2.0)(2.0) == 0.4
