"""What a step holds beyond weights, momentum and the activations of a pass, to the byte: the table of docs/cost.md.

Storages below 1 KiB are left out: losses, scores, labels, scalars. Every parameter is larger.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counters.live_bytes import LiveBytes
from esam_dist import swp
from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.models import Classifier
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule

B, WIDTH, SEED = 8, 256, 5


class Watched(nn.Module):
    """A network that notes what is alive whenever a forward pass begins."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.live: LiveBytes | None = None
        self.at_forward: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.live is not None:
            self.at_forward.append(self.live.now)
        return self.network(images)


def wide() -> nn.Module:
    """Weights outweigh activations."""
    hidden = [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, WIDTH), nn.ReLU(), *hidden, nn.Linear(WIDTH, WIDTH))


class Deep(nn.Module):
    """Activations outweigh weights: one layer, used again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(16, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).tanh()
        for _ in range(400):
            hidden = self.again(hidden).tanh()
        return self.last(self.norm(hidden))


class Trial:
    """Steps of one network, and what they held."""

    def __init__(self, network: nn.Module) -> None:
        torch.manual_seed(0)
        self.watched = Watched(network)
        module = Classifier(self.watched)
        # As on a GPU, where decay makes a copy of all gradients at once.
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, foreach=True)
        self.engine = NativeEngine(module, optimizer, Ranks())
        self.batch = Batch(torch.randn(B, 1, 4, 4), torch.randint(WIDTH, (B,)))
        self.memory = Memory()
        self.params = list(module.parameters())
        self.step(Rule())

    def step(self, rule: Rule) -> None:
        clock = PhaseClock(torch.device("cpu"))
        esam_step(self.engine, self.batch, rule, lr=0.0, ranks=Ranks(), seed=(SEED,), clock=clock, memory=self.memory)

    def held_by_descent(self, rule: Rule) -> int:
        """What was made in the step and is alive when its last forward pass begins."""
        with LiveBytes(at_least=1024) as live:
            self.watched.live = live
            self.step(rule)
        self.watched.live = None
        return self.watched.at_forward[-1]

    def peak(self, rule: Rule) -> int:
        with LiveBytes(at_least=1024) as live:
            self.step(rule)
        return live.peak

    def drawn(self, rule: Rule) -> int:
        return sum(p.nbytes for p in swp.draw(self.engine.module, rule.swp, rule.beta, seed_step(SEED)).params)

    @property
    def weights(self) -> int:
        return sum(param.nbytes for param in self.params)


def sharp(name: str = "esam", **choices: object) -> Rule:
    return Rule(name, rho=0.05, radius=0.05, **choices)


LOOKSAM = sharp("looksam", descent="looksam", alpha=0.2)


def test_sgd_holds_nothing():
    assert Trial(wide()).held_by_descent(Rule()) == 0


@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
@pytest.mark.parametrize("mode", ["tensor", "suffix", "norm"])
def test_the_descent_holds_one_copy_of_the_tensors_drawn(mode, score):
    trial, rule = Trial(wide()), sharp(beta=0.5, gamma=0.5, swp=mode, score=score)
    head_inputs = B * WIDTH * torch.float32.itemsize if score == "head" else 0
    assert 0 < trial.drawn(rule) < trial.weights
    assert trial.held_by_descent(rule) == trial.drawn(rule) + head_inputs


@pytest.mark.parametrize(
    ("rule", "copies"),
    [
        (sharp("sam"), 1),
        (sharp("asam", adaptive_eta=0.01), 1),
        (sharp("msam"), 1),
        (sharp(beta=0.5, gamma=0.5, swp="element"), 1),
        (sharp(gamma=0.25, score="random", descent="recycled"), 2),
        (sharp(gamma=0.25, score="random", descent="recycled_exact"), 2),
        (sharp("gsam", descent="gsam", alpha=0.2), 2),
        (sharp("looksam", descent="looksam", alpha=0.2), 2),
    ],
    ids=lambda value: f"{value.name}-{value.swp}-{value.descent}" if isinstance(value, Rule) else f"{value}",
)
def test_the_descent_holds_copies_of_all_weights(rule, copies):
    trial = Trial(wide())
    assert trial.held_by_descent(rule) == copies * trial.weights


def test_looksam_holds_its_flat_part_between_steps():
    trial = Trial(wide())
    with LiveBytes(at_least=1024) as live:
        trial.step(sharp("looksam", descent="looksam", alpha=0.2))
        assert live.now == trial.weights


@pytest.mark.parametrize("name", ["sgd", "sam", "asam", "msam", "gsam", "esam"])
def test_nothing_else_outlives_a_step(name):
    trial, rule = Trial(wide()), Rule() if name == "sgd" else sharp(name, descent=name if name == "gsam" else "kept")
    with LiveBytes(at_least=1024) as live:
        trial.step(rule)
        assert live.now == 0


@pytest.mark.parametrize("name", ["sam", "asam", "msam"])
def test_where_activations_dominate_the_peak_is_one_copy_above_sgd(name):
    trial = Trial(Deep())
    rule = sharp(name, adaptive_eta=0.01 if name == "asam" else None)
    assert trial.peak(rule) == trial.peak(Rule()) + trial.weights


@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
@pytest.mark.parametrize("mode", ["tensor", "suffix", "norm"])
def test_where_activations_dominate_esam_on_half_the_samples_needs_no_more_than_sgd(mode, score):
    trial = Trial(Deep())
    assert trial.peak(sharp(beta=0.5, gamma=0.5, swp=mode, score=score)) <= trial.peak(Rule())


def test_where_activations_dominate_a_mask_on_elements_needs_the_logits_more_than_sgd():
    trial = Trial(Deep())
    rule = sharp(beta=0.5, gamma=0.5, swp="element")
    assert trial.peak(rule) == trial.peak(Rule()) + B * WIDTH * torch.float32.itemsize


@pytest.mark.parametrize(
    ("rule", "copies"),
    [
        (sharp("sam"), 0),
        (sharp("asam", adaptive_eta=0.01), 0),
        (sharp("msam"), 0),
        (sharp(beta=0.5, gamma=0.5), 0),
        (sharp(beta=0.5, gamma=0.5, swp="element"), 0),
        (sharp(gamma=0.25, score="random", descent="recycled"), 2),
        (sharp(gamma=0.25, score="random", descent="recycled_exact"), 2),
        (sharp("gsam", descent="gsam", alpha=0.2), 5),
        (LOOKSAM, 4),
        (replace(LOOKSAM, reuses=True), 2),
    ],
    ids=lambda value: f"{value.name}-{value.swp}-{value.descent}" if isinstance(value, Rule) else f"{value}",
)
def test_where_weights_dominate_the_peak_is_so_many_copies_above_sgd(rule, copies):
    trial = Trial(wide())
    plain = trial.peak(Rule())
    if rule.reuses:
        trial.step(LOOKSAM)
    # Passes and update peak at different times: what is left beside whole copies is two activations at most.
    assert abs(trial.peak(rule) - plain - copies * trial.weights) <= 2 * B * WIDTH * torch.float32.itemsize


def test_the_count_sees_a_copy_too_many(monkeypatch):
    trial, rule = Trial(wide()), sharp("sam")
    kept = []
    forward = trial.watched.network.forward

    def with_a_copy(images):
        kept.append([param.detach().clone() for param in trial.params])
        return forward(images)

    monkeypatch.setattr(trial.watched.network, "forward", with_a_copy)
    assert trial.held_by_descent(rule) == 2 * trial.weights
