"""Real ranks against a simulation of all in one process, in every mode, under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esam_dist import config
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import BATCH, configuration, make_batch, make_network, train_rank
from tests.multiprocess.simulation import Simulation
from tests.multiprocess.simulation.choice import count_over_ranks
from tests.multiprocess.simulation.selection import resolved

STEPS = 4
MODES: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "sam": {"name": "sam"},
    "asam": {"name": "asam", "eta": 0.05},
    "gsam": {"name": "gsam", "alpha": 0.4},
    "looksam": {"name": "looksam", "interval": 2, "alpha": 0.5},
    "msam": {"name": "msam"},
    "vasso": {"name": "vasso", "theta": 0.6},
    "s2sam": {"name": "s2sam"},
    "fsam": {"name": "fsam", "sigma": 0.8, "decay": 0.7},
    "esam": {"scope": "rank"},
    "esam_global": {},
    "esam_released_scale": {"swp_scale": "released", "scope": "rank"},
    "esam_paper_scale": {"swp_scale": "paper"},
    "element": {"swp": "element"},
    "suffix": {"swp": "suffix"},
    "norm": {"swp": "norm"},
    "head": {"score": "head"},
    "loss": {"score": "loss"},
    "random": {"score": "random"},
    # With so few quantiles the ranks keep more or fewer than they would like to.
    "thresholds": {"transport": "thresholds", "num_quantiles": 2},
    "thresholds_capacity": {"transport": "thresholds", "num_quantiles": 2, "capacity_factor": 1.5, "gamma": 0.34},
    "capacity": {"capacity_factor": 1.0, "gamma": 0.34},
    "recycled": {"name": "recycled", "score": "random", "gamma": 0.34},
    "recycled_forward": {"name": "recycled", "score": "forward", "gamma": 0.5},
    "recycled_exact": {"name": "recycled", "exact": True, "score": "random", "scope": "rank", "gamma": 0.5},
    "interval": {"interval": 2},
    "gsam_interval": {"name": "gsam", "alpha": 0.4, "interval": 2},
    "groups": {"scope": "rank", "group_size": 3},
    "groups_gsam": {"name": "gsam", "alpha": 0.4, "group_size": 2},
}
DIRECTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"direction": "momentum"},
    "momentum_random": {"direction": "momentum", "score": "random"},
    "momentum_element": {"direction": "momentum", "swp": "element", "score": "loss"},
    "previous": {"direction": "previous", "scope": "rank"},
    "previous_suffix": {"direction": "previous", "swp": "suffix", "score": "head"},
    "average": {"direction": "average", "beta": 1.0},
    "residual": {"direction": "residual", "beta": 1.0, "sigma": 0.8, "score": "random"},
    "recycled_momentum": {"name": "recycled", "direction": "momentum", "score": "forward", "gamma": 0.5},
    "recycled_average": {"name": "recycled", "direction": "average", "score": "loss", "gamma": 0.34},
    "recycled_exact_previous": {
        **{"name": "recycled", "exact": True, "score": "random", "scope": "rank", "gamma": 0.5},
        "direction": "previous",
    },
}
ENGINES = {
    "native": {"name": "native"},
    "zero0": {"name": "deepspeed", "zero_stage": 0},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
}


def simulate(cfg: config.Config, steps: int = STEPS, num_ranks: int = 2) -> Simulation:
    simulation = Simulation(
        make_network(torch.float64),
        cfg.optim,
        cfg.method,
        cfg.train.label_smoothing,
        shared=cfg.engine.name == "deepspeed" and cfg.engine.zero_stage == 3,
    )
    for step in range(steps):
        batches = [rank_groups(cfg, step, micro, num_ranks) for micro in range(cfg.train.accumulate)]
        simulation.update(batches, cfg.run.seed, step, epoch=float(step))
    return simulation


def rank_groups(cfg: config.Config, step: int, micro: int, num_ranks: int) -> list[tuple[Tensor, Tensor]]:
    """What the ranks train on, group by group: each group counts as a rank of its own."""
    size = BATCH // cfg.method.num_groups(BATCH)
    return [
        (images[start : start + size], labels[start : start + size])
        for images, labels in (make_batch(rank, step, micro, torch.float64) for rank in range(num_ranks))
        for start in range(0, BATCH, size)
    ]


def assert_same(state: dict[str, Any], simulation: Simulation, tolerance: float) -> None:
    for name, value in (simulation.weights | simulation.buffers).items():
        torch.testing.assert_close(
            state["model"][f"network.{name}"].to(value.dtype), value, rtol=tolerance, atol=tolerance, msg=lambda m: m
        )
    for name, value in simulation.velocity.items():
        saved = state["optimizer"][f"network.{name}"]["momentum_buffer"]
        torch.testing.assert_close(saved.double(), value, rtol=tolerance, atol=tolerance)


def check(ranks: Cluster, cfg: config.Config, num_ranks: int = 2) -> None:
    # DeepSpeed trains in float32 only; its rounding is what the wider tolerance is for.
    exact = cfg.engine.name == "native"
    dtype, tolerance = (torch.float64, 1e-12) if exact else (torch.float32, 2e-5)
    outcomes = ranks.run(train_rank, cfg, STEPS, dtype)
    assert len(outcomes) == num_ranks
    assert len({outcome.digest for outcome in outcomes}) == 1, "replicas differ"
    assert_same(outcomes[0].state, simulate(cfg, num_ranks=num_ranks), tolerance)


QUICK = (
    "sgd",
    "sam",
    "gsam",
    "looksam",
    "msam",
    "esam",
    "esam_global",
    "head",
    "thresholds_capacity",
    "recycled",
    "groups",
)
"""Modes that are quick under every engine; all others are under the native one and ZeRO 1."""


@pytest.mark.parametrize(
    ("mode", "engine"),
    [
        pytest.param(*(mode, engine), marks=[] if mode in QUICK or engine in ("native", "zero1") else pytest.mark.slow)
        for mode in MODES
        for engine in ENGINES
    ],
)
def test_two_ranks_equal_the_simulation_of_both(two_ranks: Cluster, mode: str, engine: str) -> None:
    check(two_ranks, configuration(MODES[mode], engine=ENGINES[engine]))


def engines_for(modes: list[str], quick: set[str]) -> list[Any]:
    """Every mode under every engine; quick are those of `quick`, "mode-engine", and all under the native one."""
    return [
        pytest.param(mode, engine, marks=[] if engine == "native" or f"{mode}-{engine}" in quick else pytest.mark.slow)
        for mode in modes
        for engine in ENGINES
    ]


@pytest.mark.parametrize(
    ("mode", "engine"),
    engines_for(list(DIRECTIONS), quick={"momentum-zero1", "previous_suffix-zero2", "recycled_average-zero1"}),
)
def test_two_ranks_equal_the_simulation_along_any_direction(two_ranks: Cluster, mode: str, engine: str) -> None:
    check(two_ranks, configuration(DIRECTIONS[mode], engine=ENGINES[engine]))


@pytest.mark.parametrize("mode", ["esam_global", "gsam", "looksam"])
def test_three_ranks_equal_the_simulation_of_all(three_ranks: Cluster, mode: str) -> None:
    check(three_ranks, configuration(MODES[mode]), num_ranks=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_clipping_and_nesterov_equal_the_simulation(two_ranks: Cluster, engine: str) -> None:
    cfg = configuration(
        {},
        engine=ENGINES[engine],
        train={"accumulate": 3, "label_smoothing": 0.1},
        optim={"clip_grad_norm": 0.3, "nesterov": True},
    )
    check(two_ranks, cfg)


@pytest.mark.parametrize(
    ("mode", "engine"),
    engines_for(
        ["gsam", "head", "suffix", "recycled", "recycled_exact", "thresholds_capacity", "groups", "groups_gsam"],
        quick={"gsam-zero1", "recycled-zero2", "thresholds_capacity-zero1", "groups-zero2"},
    ),
)
def test_accumulation_and_clipping_equal_the_simulation_in_other_modes(
    two_ranks: Cluster, mode: str, engine: str
) -> None:
    optim = {"clip_grad_norm": 0.3}
    check(two_ranks, configuration(MODES[mode], engine=ENGINES[engine], train={"accumulate": 2}, optim=optim))


def test_ranks_keep_another_number_than_wanted_where_quantiles_are_few() -> None:
    """Else the comparisons above would not notice a step that took the wanted number for the kept one."""
    for mode in ("thresholds", "thresholds_capacity"):
        cfg = configuration(MODES[mode])
        wanted = count_over_ranks(resolved(cfg.method, 0.0), 2, BATCH)
        kept = simulate(cfg).kept
        assert any(number != wanted for number in kept), (mode, kept)


SHARED: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "sam": {"name": "sam"},
    "asam": {"name": "asam", "eta": 0.05},
    "gsam": {"name": "gsam", "alpha": 0.4},
    "esam_global": {"beta": 1.0},
    "head": {"beta": 1.0, "score": "head", "scope": "rank"},
    "loss": {"beta": 1.0, "score": "loss"},
    "random": {"beta": 1.0, "score": "random"},
    "thresholds": {"beta": 1.0, "score": "loss"} | MODES["thresholds"],
    "capacity": {"beta": 1.0} | MODES["capacity"],
    "interval": {"beta": 1.0, "interval": 2},
}


@pytest.mark.parametrize("mode", SHARED)
def test_zero3_equals_the_simulation_of_a_shared_perturbation(two_ranks: Cluster, mode: str) -> None:
    check(two_ranks, configuration(SHARED[mode], engine={"name": "deepspeed", "zero_stage": 3}))


@pytest.mark.parametrize("mode", ["esam_global", "gsam"])
def test_clipping_under_zero3_equals_the_simulation(two_ranks: Cluster, mode: str) -> None:
    engine = {"name": "deepspeed", "zero_stage": 3}
    check(two_ranks, configuration(SHARED[mode], engine=engine, optim={"clip_grad_norm": 0.3}))


@pytest.mark.parametrize("stage", [1, 2])
def test_offloaded_optimizer_equals_the_simulation(two_ranks: Cluster, stage: int) -> None:
    check(two_ranks, configuration({}, engine={"name": "deepspeed", "zero_stage": stage, "offload": True}))
