"""What a step holds beyond weights, momentum and the activations of a pass, to the byte: the table of docs/cost.md.

Storages below 1 KiB are left out: losses, scores, labels, scalars. Every parameter is larger.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counters.live_bytes import LiveBytes
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.losses import CrossEntropy
from esam_dist.methods import Method
from esam_dist.models import Classifier
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment, swp
from tests.steps import PLAIN, sharp

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
        self.trainer = SharpnessAware.over(NativeEngine(module, optimizer, Ranks()), PLAIN, Ranks(), seed=SEED)
        self.batch = Batch(torch.randn(B, 1, 4, 4), torch.randint(WIDTH, (B,)))
        self.params = list(module.parameters())
        self.step(PLAIN)

    def step(self, method: Method, update: int = 0) -> None:
        self.trainer.method = method
        self.trainer.step(*self.batch, CrossEntropy(0.0), moment=Moment(update))

    def held_by_descent(self, method: Method, update: int = 0) -> int:
        """What was made in the step and is alive when its last forward pass begins."""
        with LiveBytes(at_least=1024) as live:
            self.watched.live = live
            self.step(method, update)
        self.watched.live = None
        return self.watched.at_forward[-1]

    def peak(self, method: Method, update: int = 0) -> int:
        with LiveBytes(at_least=1024) as live:
            self.step(method, update)
        return live.peak

    def drawn(self, method: Any) -> int:
        """The bytes that `method` draws in update 0."""
        generator = seed_step(SEED, 0, 0, 0)
        drawn = swp.draw(self.trainer.engine.module, method.swp, method.beta(0.0), generator)
        return sum(param.nbytes for param in drawn.params)

    @property
    def weights(self) -> int:
        return sum(param.nbytes for param in self.params)


HALF = {"beta": 0.5, "gamma": 0.5}
LOGITS = B * WIDTH * torch.float32.itemsize


def named(value: object) -> str | None:
    """The id of a parameter that is a method."""
    if not isinstance(value, Method):
        return None
    return "-".join([value.name, *(f"{key}={getattr(value, key)}" for key in ("swp", "exact") if hasattr(value, key))])


def test_sgd_holds_nothing():
    assert Trial(wide()).held_by_descent(PLAIN) == 0


@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
@pytest.mark.parametrize("mode", ["tensor", "suffix", "norm"])
def test_the_descent_holds_one_copy_of_the_tensors_drawn(mode, score):
    trial, method = Trial(wide()), sharp(**HALF, swp=mode, score=score)
    assert 0 < trial.drawn(method) < trial.weights
    assert trial.held_by_descent(method) == trial.drawn(method)


@pytest.mark.parametrize(
    ("method", "copies"),
    [
        (sharp("sam"), 1),
        (sharp("asam"), 1),
        (sharp("msam"), 1),
        (sharp(**HALF, swp="element"), 1),
        (sharp("recycled", gamma=0.25), 2),
        (sharp("recycled", gamma=0.25, exact=True), 2),
        (sharp("gsam"), 2),
        (sharp("looksam"), 2),
    ],
    ids=named,
)
def test_the_descent_holds_copies_of_all_weights(method, copies):
    trial = Trial(wide())
    assert trial.held_by_descent(method) == copies * trial.weights


def test_looksam_holds_its_flat_part_between_steps():
    trial = Trial(wide())
    with LiveBytes(at_least=1024) as live:
        trial.step(sharp("looksam"))
        assert live.now == trial.weights


@pytest.mark.parametrize("name", ["sgd", "sam", "asam", "msam", "gsam", "esam", "recycled"])
@pytest.mark.parametrize("score", ["forward", "head"])
def test_nothing_else_outlives_a_step(name, score):
    selective = {"gamma": 0.5, "score": score} if name in ("esam", "recycled") else {}
    trial, method = Trial(wide()), PLAIN if name == "sgd" else sharp(name, **selective)
    with LiveBytes(at_least=1024) as live:
        trial.step(method)
        assert live.now == 0


@pytest.mark.parametrize("name", ["sam", "asam", "msam"])
def test_where_activations_dominate_the_peak_is_one_copy_above_sgd(name):
    trial = Trial(Deep())
    assert trial.peak(sharp(name)) == trial.peak(PLAIN) + trial.weights


@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
@pytest.mark.parametrize("mode", ["tensor", "suffix", "norm"])
def test_where_activations_dominate_esam_on_half_the_samples_needs_no_more_than_sgd(mode, score):
    trial = Trial(Deep())
    assert trial.peak(sharp(**HALF, swp=mode, score=score)) <= trial.peak(PLAIN)


def test_where_activations_dominate_a_mask_on_elements_needs_what_sgd_needs():
    trial = Trial(Deep())
    assert trial.peak(sharp(**HALF, swp="element")) == trial.peak(PLAIN)


LOOKSAM = sharp("looksam")


@pytest.mark.parametrize(
    ("method", "update", "copies"),
    [
        (sharp("sam"), 0, 0),
        (sharp("asam"), 0, 0),
        (sharp("msam"), 0, 0),
        (sharp(**HALF), 0, 0),
        (sharp(**HALF, swp="element"), 0, 0),
        (sharp("recycled", gamma=0.25), 0, 2),
        (sharp("recycled", gamma=0.25, exact=True), 0, 2),
        (sharp("gsam"), 0, 3),
        (LOOKSAM, 0, 2),
        (LOOKSAM, 1, 1),
    ],
    ids=named,
)
def test_where_weights_dominate_the_peak_is_so_many_copies_above_sgd(method, update, copies):
    trial = Trial(wide())
    plain = trial.peak(PLAIN)
    if update:
        trial.step(method)
    # Passes and update peak at different times: what is left beside whole copies is two activations at most.
    assert abs(trial.peak(method, update) - plain - copies * trial.weights) <= 2 * LOGITS


def test_the_count_sees_a_copy_too_many(monkeypatch):
    trial, method = Trial(wide()), sharp("sam")
    kept = []
    forward = trial.watched.network.forward

    def with_a_copy(images):
        kept.append([param.detach().clone() for param in trial.params])
        return forward(images)

    monkeypatch.setattr(trial.watched.network, "forward", with_a_copy)
    assert trial.held_by_descent(method) == 2 * trial.weights
