"""What a step computes, to the last multiplication: docs/cost.md's model against PyTorch's FLOP counter.

The model (`tests/flop_model.py`) knows nothing of autograd. B samples per batch, of which the descent keeps a share.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.counters.flops import flop_counter
from esam_dist import swp
from esam_dist.clock import PhaseClock
from esam_dist.coordinate import Coordination
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule
from tests.flop_model import NETWORKS, SIZE, B, Cost, K, cost_of


@pytest.fixture(params=NETWORKS)
def cost(request) -> Cost:
    return cost_of(request.param)


def counted(cost: Cost, rule: Rule, memory: Memory | None = None, seed: int = 0) -> int:
    """FLOPs of one step."""
    optimizer = torch.optim.SGD(cost.network.parameters(), lr=0.0, momentum=0.9)
    engine = NativeEngine(cost.network, optimizer, Ranks())
    batch = Batch(torch.randn(B, 3, SIZE, SIZE), torch.randint(K, (B,)))
    with flop_counter() as counter:
        stats = esam_step(
            engine,
            batch,
            rule,
            lr=0.0,
            ranks=Ranks(),
            seed=(seed,),
            clock=PhaseClock(torch.device("cpu")),
            memory=memory or Memory(),
        )
    assert not stats.skipped
    return counter.get_total_flops()


def sharp(name: str, **choices: object) -> Rule:
    return Rule(name, rho=0.05, radius=0.05, **choices)


def paper(**choices: object) -> Rule:
    return sharp("esam", **{"beta": 0.5, "gamma": 0.5, **choices})


def test_sgd_skips_the_input_gradient_of_the_first_layer_and_no_other(cost):
    first = cost.products[0]
    recomputed = sum(p.input_gradient - 2 * p.forward for p in cost.products if p.weight is None)
    assert isinstance(first.reader, nn.Conv2d)
    assert cost.sgd == 3 * cost.forward - first.forward + recomputed
    assert counted(cost, Rule()) == B * cost.sgd


def test_msam_costs_what_sgd_costs(cost):
    assert counted(cost, sharp("msam")) == B * cost.sgd


@pytest.mark.parametrize(
    "rule",
    [
        sharp("sam"),
        sharp("asam", adaptive_eta=0.01),
        sharp("gsam", descent="gsam", alpha=0.2),
        sharp("looksam", descent="looksam", alpha=0.2),
        sharp("esam"),
    ],
    ids=lambda rule: rule.name,
)
def test_two_passes_over_the_whole_batch_cost_twice_sgd(cost, rule):
    assert counted(cost, rule) == 2 * B * cost.sgd


def test_looksam_costs_what_sgd_costs_once_it_has_a_flat_part(cost):
    memory = Memory()
    between = sharp("looksam", descent="looksam", alpha=0.2, reuses=True)
    assert counted(cost, between, memory) == 2 * B * cost.sgd
    assert counted(cost, between, memory) == B * cost.sgd


@pytest.mark.parametrize(
    ("mode", "seed"), [("tensor", 0), ("tensor", 1), ("suffix", 0), ("suffix", 1), ("suffix", 2), ("norm", 0)]
)
def test_the_ascent_computes_only_gradients_of_what_it_perturbs(cost, mode, seed):
    rule = paper(swp=mode, score="random")
    drawn = cost.drawn(rule, seed)
    ascent = cost.forward + cost.backward(drawn)
    assert counted(cost, rule, seed=seed) == B * ascent + B // 2 * cost.sgd
    weights = {product.weight for product in cost.products if product.weight is not None}
    undrawn = sum(p.weight_gradient for p in cost.products if p.weight in weights.difference(drawn))
    assert 0 < undrawn <= cost.sgd - ascent


def test_perturbing_normalisation_alone_leaves_out_every_weight_gradient_of_a_layer(cost):
    weights = sum(product.weight_gradient for product in cost.products)
    assert counted(cost, paper(swp="norm", score="random")) == B * (cost.sgd - weights) + B // 2 * cost.sgd


def test_the_paper_s_mask_on_elements_saves_nothing_in_the_ascent(cost):
    assert counted(cost, paper(swp="element", score="random")) == (B + B // 2) * cost.sgd


def test_a_suffix_of_the_last_tensor_goes_backwards_through_no_layer(cost):
    rule = paper(swp="suffix", beta=0.01, score="random")
    assert cost.drawn(rule) == [list(cost.network.parameters())[-1]]
    assert counted(cost, rule) == B * cost.forward + B // 2 * cost.sgd


@pytest.mark.parametrize("kept", [2, 4])
@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
def test_a_score_costs_a_forward_or_two_products_of_the_head_or_nothing(cost, score, kept):
    rule = paper(score=score, gamma=kept / B)
    passes = B * (cost.forward + cost.backward(cost.drawn(rule))) + kept * cost.sgd
    scoring = {"forward": B * cost.forward, "head": B * cost.head, "loss": 0, "random": 0}
    assert counted(cost, rule) == passes + scoring[score]


@pytest.mark.parametrize("transport", ["scores", "thresholds"])
def test_capacity_fixes_how_many_samples_the_descent_runs_on(cost, transport):
    rule = paper(beta=1.0, score="loss", gamma=0.25, scope="global", transport=transport, capacity_factor=1.5)
    assert counted(cost, rule) == (B + 3) * cost.sgd


@pytest.mark.parametrize("score", ["forward", "head", "random"])
def test_recycling_costs_no_pass_of_its_own(cost, score):
    rule = paper(beta=1.0, gamma=0.25, score=score, descent="recycled")
    scoring = {"forward": B * cost.forward, "head": B * cost.head, "random": 0}
    assert counted(cost, rule) == (B + 2) * cost.sgd + scoring[score]


def test_recycling_in_parts_costs_what_recycling_costs(cost):
    rule = paper(beta=1.0, gamma=0.25, score="random", descent="recycled_exact")
    assert counted(cost, rule) == (B + 2) * cost.sgd


def test_the_counter_sees_the_gradient_of_a_tensor_that_was_not_drawn(cost, monkeypatch):
    rule = paper(score="random")
    drawn, everything = cost.drawn(rule), list(cost.network.parameters())
    monkeypatch.setattr(swp, "draw", lambda *_: swp.Draw(everything))
    wasted = cost.backward(everything) - cost.backward(drawn)
    assert wasted > 0
    assert counted(cost, rule) == B * (cost.forward + cost.backward(drawn) + wasted) + B // 2 * cost.sgd


def test_the_counter_sees_a_scoring_forward_that_nobody_asked_for(cost, monkeypatch):
    rule = paper(beta=1.0, score="random")
    select = Coordination.end

    def scored_again(selection):
        cost.network(torch.randn(B, 3, SIZE, SIZE))
        return select(selection)

    monkeypatch.setattr(Coordination, "end", scored_again)
    assert counted(cost, rule) == (B + B // 2) * cost.sgd + B * cost.forward
