"""Frozen weights, and rates of their own for others: real ranks against the simulation, under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from esam_dist import config
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import Network, configuration, make_network, train_rank
from tests.multiprocess.simulation import Simulation
from tests.multiprocess.test_parity import DIRECTIONS, ENGINES, MODES, assert_same, rank_groups

STEPS = 4
ALL = ENGINES | {"zero3": {"name": "deepspeed", "zero_stage": 3}}
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"freeze": ["body.0.*", "body.1.*"]},
    "optim": {
        "layer_decay": 0.5,
        "head_lr_factor": 3.0,
        "overrides": [{"match": "*.bias", "lr_factor": 2.0, "weight_decay": 0.0}],
    },
}
# By hand. The layers: the first convolution with its BatchNorm, the second with its own, the classifier.
LR_FACTORS = {"body.3.weight": 0.5, "body.3.bias": 1.0, "body.4.weight": 0.5, "body.4.bias": 1.0}
LR_FACTORS |= {"head.weight": 3.0, "head.bias": 6.0}
DECAYS = {"body.3.bias": 0.0, "body.4.bias": 0.0, "head.bias": 0.0}


def frozen_network() -> Network:
    network = make_network(torch.float64)
    for part in network.body[:2]:
        part.requires_grad_(False)
    network.body[1].eval()
    return network


def simulate(cfg: config.Config) -> Simulation:
    shared = cfg.engine.zero_stage == 3
    found = Simulation(frozen_network(), cfg.optim, cfg.method, 0.0, shared, LR_FACTORS, DECAYS)
    for step in range(STEPS):
        found.update([rank_groups(cfg, step, 0, 2)], cfg.run.seed, step, epoch=float(step))
    return found


CASES = [("sam", engine) for engine in ALL] + [
    *((mode, "native") for mode in ("sgd", "gsam", "looksam", "msam", "vasso", "esam", "suffix", "norm", "element")),
    *((mode, "native") for mode in ("head", "recycled", "groups", "asam", "fsam", "s2sam")),
    *(("esam", engine) for engine in ("zero1", "zero2")),
    *(("msam", engine) for engine in ("zero1", "zero2")),
    *((mode, "zero3") for mode in ("gsam", "asam", "sgd")),
    *((mode, "native") for mode in DIRECTIONS),
]
QUICK = (("sam", "zero1"), ("esam", "native"))


@pytest.mark.parametrize(
    ("mode", "engine"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_only_what_trains_is_perturbed_and_each_weight_moves_at_its_own_rate(
    two_ranks: Cluster, mode: str, engine: str
) -> None:
    cfg = configuration((MODES | DIRECTIONS)[mode], engine=ALL[engine], **SECTIONS)
    dtype, tolerance = (torch.float64, 1e-12) if engine == "native" else (torch.float32, 2e-5)
    outcomes = two_ranks.run(train_rank, cfg, STEPS, dtype)
    assert len({outcome.digest for outcome in outcomes}) == 1, "replicas differ"
    assert_same(outcomes[0].state, simulate(cfg), tolerance)
    before = make_network(dtype).state_dict()
    after = {name.removeprefix("network."): value for name, value in outcomes[0].state["model"].items()}
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert still == [name for name in before if name.startswith(("body.0.", "body.1."))]


@pytest.mark.parametrize(
    "engine", [*(pytest.param(engine, marks=pytest.mark.slow) for engine in ("native", "zero1")), "zero3"]
)
def test_it_goes_on_to_the_bit(two_ranks: Cluster, engine: str) -> None:
    cfg = configuration(MODES["sam"], engine=ALL[engine], **SECTIONS)
    whole = two_ranks.run(train_rank, cfg, STEPS, torch.float32)
    half = two_ranks.run(train_rank, cfg, 2, torch.float32)
    rest = two_ranks.run(train_rank, cfg, STEPS - 2, torch.float32, (half[0], 2))
    assert [outcome.digest for outcome in rest] == [outcome.digest for outcome in whole]
    for name, entry in whole[0].state["optimizer"].items():
        assert torch.equal(entry["momentum_buffer"], rest[0].state["optimizer"][name]["momentum_buffer"]), name


def test_statistics_that_stay_are_the_same_to_the_bit_on_three_ranks(three_ranks: Cluster) -> None:
    # A mean of three equal numbers need not be that number.
    before, after = three_ranks.run(_stay)[0]
    assert torch.equal(before, after)


def _stay(ranks: Any) -> tuple[torch.Tensor, torch.Tensor]:
    norm = nn.BatchNorm1d(1000)
    norm.running_mean = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    before = norm.running_mean.clone()
    norm.eval()
    for _ in range(9):
        ranks.average_buffers(norm)
    return before, norm.running_mean
