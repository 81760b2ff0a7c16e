"""Two real ranks against a simulation of both in one process, in every mode, under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esam_dist import config
from esam_dist.rule import Rule
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import configuration, make_batch, make_network, train_rank
from tests.multiprocess.reference import Simulation

STEPS = 4
MODES: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "sam": {"name": "sam"},
    "asam": {"name": "asam", "eta": 0.05},
    "gsam": {"name": "gsam", "alpha": 0.4},
    "looksam": {"name": "looksam", "interval": 2, "alpha": 0.5},
    "msam": {"name": "msam"},
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
    # With at least as many quantiles as samples the threshold is exact.
    "thresholds": {"transport": "thresholds", "num_quantiles": 6},
    "capacity": {"capacity_factor": 1.0, "gamma": 0.34},
    "recycled": {"descent": "recycled", "beta": 1.0, "score": "random", "gamma": 0.34},
    "recycled_forward": {"descent": "recycled", "beta": 1.0, "score": "forward"},
    "recycled_exact": {"descent": "recycled_exact", "beta": 1.0, "score": "random", "scope": "rank"},
    "interval": {"interval": 2},
}
ENGINES = {
    "native": {"name": "native"},
    "zero0": {"name": "deepspeed", "zero_stage": 0},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
}


def simulate(cfg: config.Config) -> Simulation:
    simulation = Simulation(
        make_network(torch.float64),
        cfg.optim.lr,
        cfg.optim.momentum,
        cfg.optim.weight_decay,
        cfg.optim.clip_grad_norm,
        cfg.optim.nesterov,
        shared=cfg.engine.name == "deepspeed" and cfg.engine.zero_stage == 3,
    )
    for step in range(STEPS):
        batches = [
            [make_batch(rank, step, micro, torch.float64) for rank in range(2)] for micro in range(cfg.train.accumulate)
        ]
        simulation.update(batches, Rule.at(cfg, step=step, epoch=float(step)), (cfg.run.seed, step))
    return simulation


def assert_same(state: dict[str, Any], simulation: Simulation, tolerance: float) -> None:
    for name, value in (simulation.weights | simulation.buffers).items():
        torch.testing.assert_close(
            state["model"][f"network.{name}"].to(value.dtype), value, rtol=tolerance, atol=tolerance, msg=lambda m: m
        )
    for name, value in simulation.velocity.items():
        saved = state["optimizer"][f"network.{name}"]["momentum_buffer"]
        torch.testing.assert_close(saved.double(), value, rtol=tolerance, atol=tolerance)


def check(ranks: Cluster, cfg: config.Config) -> None:
    # DeepSpeed trains in float32 only; its rounding is what the wider tolerance is for.
    exact = cfg.engine.name == "native"
    dtype, tolerance = (torch.float64, 1e-12) if exact else (torch.float32, 2e-5)
    outcomes = ranks.run(train_rank, cfg, STEPS, dtype)
    assert outcomes[0].digest == outcomes[1].digest, "replicas differ"
    assert_same(outcomes[0].state, simulate(cfg), tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_the_simulation_of_both(two_ranks: Cluster, mode: str, engine: str) -> None:
    check(two_ranks, configuration(MODES[mode], engine=ENGINES[engine]))


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
    "method", [{"name": "sgd"}, {"name": "sam"}, {"beta": 1.0}, {"beta": 1.0, "score": "head", "scope": "rank"}]
)
def test_zero3_equals_the_simulation_of_a_shared_perturbation(two_ranks: Cluster, method: dict[str, Any]) -> None:
    check(two_ranks, configuration(method, engine={"name": "deepspeed", "zero_stage": 3}))


@pytest.mark.parametrize("stage", [1, 2])
def test_offloaded_optimizer_equals_the_simulation(two_ranks: Cluster, stage: int) -> None:
    check(two_ranks, configuration({}, engine={"name": "deepspeed", "zero_stage": stage, "offload": True}))
