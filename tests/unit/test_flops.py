"""What a step computes, to the last multiplication: docs/cost.md's model against PyTorch's FLOP counter.

The model (`tests/flop_model.py`) knows nothing of autograd. B samples per batch, of which the descent keeps a share.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esam_dist.engine.native import NativeEngine
from esam_dist.flops import flop_counter
from esam_dist.losses import CrossEntropy
from esam_dist.methods import Method
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import swp
from esam_dist.step.choice import Choice
from tests.flop_model import NETWORKS, SIZE, B, Cost, K, cost_of
from tests.steps import PLAIN, sharp


@pytest.fixture(params=NETWORKS)
def cost(request) -> Cost:
    return cost_of(request.param)


def training(cost: Cost, method: Method, seed: int = 0) -> SharpnessAware:
    optimizer = torch.optim.SGD(cost.network.parameters(), lr=0.0, momentum=0.9)
    return SharpnessAware.over(NativeEngine(cost.network, optimizer, Ranks()), method, Ranks(), seed=seed)


def next_step(trainer: SharpnessAware) -> int:
    """FLOPs of one step."""
    images, labels = torch.randn(B, 3, SIZE, SIZE), torch.randint(K, (B,))
    with flop_counter() as counter:
        stats = trainer.step(images, labels, CrossEntropy(0.0))
    assert not stats.skipped
    return counter.get_total_flops()


def counted(cost: Cost, method: Method, seed: int = 0) -> int:
    """FLOPs of the first step of a training."""
    return next_step(training(cost, method, seed))


def paper(**keys: object) -> Method:
    return sharp(**{"beta": 0.5, "gamma": 0.5, **keys})


def test_sgd_skips_the_input_gradient_of_the_first_layer_and_no_other(cost):
    first = cost.products[0]
    recomputed = sum(p.input_gradient - 2 * p.forward for p in cost.products if p.weight is None)
    assert isinstance(first.reader, nn.Conv2d)
    assert cost.sgd == 3 * cost.forward - first.forward + recomputed
    assert counted(cost, PLAIN) == B * cost.sgd


@pytest.mark.parametrize("name", ["msam", "s2sam"])
def test_a_direction_that_is_there_already_costs_what_sgd_costs(cost, name):
    trainer = training(cost, sharp(name))
    for _ in range(2):
        assert next_step(trainer) == B * cost.sgd


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "looksam", "fsam", "vasso", "esam"])
def test_two_passes_over_the_whole_batch_cost_twice_sgd(cost, name):
    assert counted(cost, sharp(name)) == 2 * B * cost.sgd


def test_looksam_costs_what_sgd_costs_once_it_has_a_flat_part(cost):
    trainer = training(cost, sharp("looksam", interval=3))
    assert [next_step(trainer) for _ in range(4)] == [2 * B * cost.sgd, B * cost.sgd, B * cost.sgd, 2 * B * cost.sgd]


@pytest.mark.parametrize(
    ("mode", "seed"), [("tensor", 0), ("tensor", 1), ("suffix", 0), ("suffix", 1), ("suffix", 2), ("norm", 0)]
)
def test_the_ascent_computes_only_gradients_of_what_it_perturbs(cost, mode, seed):
    method = paper(swp=mode, score="random")
    drawn = cost.drawn(method, seed)
    ascent = cost.forward + cost.backward(drawn)
    assert counted(cost, method, seed=seed) == B * ascent + B // 2 * cost.sgd
    weights = {product.weight for product in cost.products if product.weight is not None}
    undrawn = sum(p.weight_gradient for p in cost.products if p.weight in weights.difference(drawn))
    assert 0 < undrawn <= cost.sgd - ascent


def test_perturbing_normalisation_alone_leaves_out_every_weight_gradient_of_a_layer(cost):
    weights = sum(product.weight_gradient for product in cost.products)
    assert counted(cost, paper(swp="norm", score="random")) == B * (cost.sgd - weights) + B // 2 * cost.sgd


def test_the_paper_s_mask_on_elements_saves_nothing_in_the_ascent(cost):
    assert counted(cost, paper(swp="element", score="random")) == (B + B // 2) * cost.sgd


def test_a_suffix_of_the_last_tensor_goes_backwards_through_no_layer(cost):
    method = paper(swp="suffix", beta=0.01, score="random")
    assert cost.drawn(method) == [list(cost.network.parameters())[-1]]
    assert counted(cost, method) == B * cost.forward + B // 2 * cost.sgd


@pytest.mark.parametrize("kept", [2, 4])
@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
def test_a_score_costs_a_forward_or_two_products_of_the_head_or_nothing(cost, score, kept):
    method = paper(score=score, gamma=kept / B)
    passes = B * (cost.forward + cost.backward(cost.drawn(method))) + kept * cost.sgd
    scoring = {"forward": B * cost.forward, "head": B * cost.head, "loss": 0, "random": 0}
    assert counted(cost, method) == passes + scoring[score]


@pytest.mark.parametrize("transport", ["scores", "thresholds"])
def test_capacity_fixes_how_many_samples_the_descent_runs_on(cost, transport):
    method = paper(beta=1.0, score="loss", gamma=0.25, scope="global", transport=transport, capacity_factor=1.5)
    assert counted(cost, method) == (B + 3) * cost.sgd


@pytest.mark.parametrize("score", ["forward", "head", "random"])
def test_recycling_costs_no_pass_of_its_own(cost, score):
    method = sharp("recycled", gamma=0.25, score=score)
    scoring = {"forward": B * cost.forward, "head": B * cost.head, "random": 0}
    assert counted(cost, method) == (B + 2) * cost.sgd + scoring[score]


def test_recycling_in_parts_costs_what_recycling_costs(cost):
    method = sharp("recycled", gamma=0.25, exact=True)
    assert counted(cost, method) == (B + 2) * cost.sgd


@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
@pytest.mark.parametrize("direction", ["momentum", "previous"])
def test_a_direction_without_a_pass_costs_what_its_score_needs_at_the_unperturbed_weights(cost, direction, score):
    trainer = training(cost, sharp(gamma=0.5, direction=direction, score=score))
    scoring = {"forward": 2 * B * cost.forward, "head": B * (cost.forward + cost.head), "loss": B * cost.forward}
    for _ in range(2):
        assert next_step(trainer) == B // 2 * cost.sgd + scoring.get(score, 0)


@pytest.mark.parametrize("direction", ["average", "residual"])
def test_a_moving_average_costs_no_pass_of_its_own(cost, direction):
    trainer = training(cost, sharp(gamma=0.5, direction=direction, score="random"))
    for _ in range(2):
        assert next_step(trainer) == (B + B // 2) * cost.sgd


def test_the_counter_sees_the_gradient_of_a_tensor_that_was_not_drawn(cost, monkeypatch):
    method = paper(score="random")
    drawn, everything = cost.drawn(method), list(cost.network.parameters())
    monkeypatch.setattr(swp, "draw", lambda *_: swp.Draw(everything))
    wasted = cost.backward(everything) - cost.backward(drawn)
    assert wasted > 0
    assert counted(cost, method) == B * (cost.forward + cost.backward(drawn) + wasted) + B // 2 * cost.sgd


def test_the_counter_sees_a_scoring_forward_that_nobody_asked_for(cost, monkeypatch):
    method = paper(beta=1.0, score="random")
    select = Choice.end

    def scored_again(choice):
        cost.network(torch.randn(B, 3, SIZE, SIZE))
        return select(choice)

    monkeypatch.setattr(Choice, "end", scored_again)
    assert counted(cost, method) == (B + B // 2) * cost.sgd + B * cost.forward
