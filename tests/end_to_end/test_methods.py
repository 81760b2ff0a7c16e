"""Every method and mode trains by the same command; its rows of metrics tell what it did."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from esam_dist.step import selection
from tests.commands import here, rows

BATCH, STEPS_PER_EPOCH = 8, 10
ESAM = ("method.beta=0.5", "method.gamma=0.5")
RECYCLED = ("method.name=recycled", "method.gamma=0.5", "method.score=random", "method.scope=rank")

# Overrides; the share of the samples kept; whether the rise at the perturbed weights is known in each of three steps.
ALWAYS, NEVER = [True] * 3, [False] * 3
METHODS = {
    "sgd": (["method.name=sgd"], 1.0, NEVER),
    "sam": (["method.name=sam"], 1.0, ALWAYS),
    "asam": (["method.name=asam", "method.rho=0.5"], 1.0, ALWAYS),
    # The perturbed weights are the only ones that it visits.
    "msam": (["method.name=msam"], 1.0, NEVER),
    "gsam": (["method.name=gsam"], 1.0, ALWAYS),
    "looksam": (["method.name=looksam", "method.interval=2"], 1.0, [True, False, True]),
    "esam": ([*ESAM], 0.5, ALWAYS),
    "esam, element": ([*ESAM, "method.swp=element"], 0.5, ALWAYS),
    "esam, suffix, head": ([*ESAM, "method.swp=suffix", "method.score=head"], 0.5, ALWAYS),
    "esam, norm, loss": ([*ESAM, "method.swp=norm", "method.score=loss"], 0.5, ALWAYS),
    "esam, released": ([*ESAM, "method.swp_scale=released", "method.scope=rank"], 0.5, ALWAYS),
    # One rank of eight samples with as many quantiles: exact.
    "esam, thresholds": ([*ESAM, "method.transport=thresholds", "method.num_quantiles=8"], 0.5, ALWAYS),
    "esam, capacity": ([*ESAM, "method.capacity_factor=1.25"], 0.5, ALWAYS),
    "esam, groups": ([*ESAM, "method.scope=rank", "method.group_size=4"], 0.5, ALWAYS),
    "esam, accumulated": ([*ESAM, "train.accumulate=2"], 0.5, ALWAYS),
    "recycled": ([*RECYCLED], 0.5, ALWAYS),
    "recycled, exact": ([*RECYCLED, "method.exact=true"], 0.5, ALWAYS),
    "recycled, exact, groups": ([*RECYCLED, "method.exact=true", "method.group_size=4"], 0.5, ALWAYS),
    "fsam": (["method.name=fsam"], 1.0, ALWAYS),
    "vasso": (["method.name=vasso"], 1.0, ALWAYS),
    "s2sam": (["method.name=s2sam"], 1.0, NEVER),
    # Without a pass at w nothing is known there; a score that is a rise makes it look.
    "esam, momentum, random": ([*ESAM, "method.direction=momentum", "method.score=random"], 0.5, NEVER),
    "esam, momentum, forward": ([*ESAM, "method.direction=momentum"], 0.5, ALWAYS),
    "recycled, residual": ([*RECYCLED, "method.direction=residual"], 0.5, ALWAYS),
}


@pytest.fixture
def train(tiny, tmp_path):
    """Train on one process, ten steps an epoch; returns the rows of the steps."""

    def run(*overrides):
        answer = here("train", tiny, f"run.folder={tmp_path}", "train.validate_every=9", *overrides)
        assert answer.status == 0, answer.err
        return rows(tmp_path)

    return run


@pytest.mark.parametrize(("overrides", "kept", "measured"), METHODS.values(), ids=METHODS)
def test_every_method_trains_by_the_same_command(train, overrides, kept, measured):
    seen = train("train.max_steps=3", *overrides)
    assert [row["step"] for row in seen] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0.0 for row in seen)
    assert [row["kept_fraction"] for row in seen] == [kept] * 3
    assert [row["kept_samples"] for row in seen] == [kept * samples for samples in _samples_of(seen)]
    assert [row["sharpness"] is not None for row in seen] == measured
    assert all((row["selection_threshold"] is not None) == (kept < 1.0) for row in seen)
    assert not any(row["skipped_perturbations"] for row in seen)


def test_looksam_perturbs_every_fifth_step(train):
    seen = train("train.max_steps=11", "method.name=looksam", "method.interval=5")
    assert [row["step"] for row in seen if row["sharpness"] is not None] == [1, 6, 11]
    # Between them it is the same method, not a plain step.
    assert {row["rho"] for row in seen} == {0.05}


def test_gamma_warms_up_from_1(train):
    seen = train("train.epochs=3", "method.gamma={from: 1.0, to: 0.5, epochs: 2}")
    kept = [row["kept_fraction"] for row in seen]
    gammas = [max(0.5, 1.0 - 0.25 * step / STEPS_PER_EPOCH) for step in range(3 * STEPS_PER_EPOCH)]
    assert [row["gamma"] for row in seen] == pytest.approx(gammas)
    assert kept == [selection.num_kept(row["gamma"], BATCH) / BATCH for row in seen]
    assert all(after <= before for before, after in pairwise(kept))
    assert (kept[0], set(kept[2 * STEPS_PER_EPOCH :])) == (1.0, {0.5})
    # Nothing is chosen where everything is kept.
    assert [row["selection_threshold"] is None for row in seen] == [row["gamma"] == 1.0 for row in seen]


PLAIN_STEPS = {
    "from": (["method.phase={from: 0.5}"], range(11, 21)),
    "to": (["method.phase={to: 0.25}"], range(1, 6)),
    "between": (["method.phase={from: 0.25, to: 0.5}"], range(6, 11)),
    "interval": (["method.interval=3"], range(1, 21, 3)),
    "phase and interval": (["method.phase={from: 0.75}", "method.interval=4"], [17]),
    "no radius": (["method.rho=[[0, 0.0], [1, 0.05]]"], range(11, 21)),
}


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        *(("esam", choice) for choice in PLAIN_STEPS),
        ("sam", "phase and interval"),
        ("msam", "interval"),
        ("looksam", "from"),
    ],
)
def test_phase_and_interval_leave_plain_steps(train, name, choice):
    overrides, sharp = PLAIN_STEPS[choice]
    turns = ["method.interval=2"] if name == "looksam" else []
    seen = train("train.epochs=2", f"method.name={name}", *turns, *overrides)
    assert [row["step"] for row in seen if row["rho"] > 0.0] == list(sharp)
    measured = {"msam": [], "looksam": sharp[::2]}.get(name, sharp)
    assert [row["step"] for row in seen if row["sharpness"] is not None] == list(measured)
    assert [row["step"] for row in seen if row["sharp_updates"]] == list(sharp)
    # A plain step uses every sample.
    assert {row["kept_fraction"] for row in seen if row["rho"] == 0.0} == {1.0}


def _samples_of(seen):
    return [after - before for before, after in pairwise([0, *(row["samples"] for row in seen)])]
