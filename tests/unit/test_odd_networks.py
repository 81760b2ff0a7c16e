"""Networks whose gradients share memory, or have none: weights come back to the bit, and the step is the formula's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.data import Batch
from esam_dist.randomness import seed_step
from esam_dist.step.swp import draw
from tests.steps import LR, PLAIN, RADIUS, Trial, same, sharp, step, weights


class Summed(nn.Module):
    """A weight that is the sum of two parameters, and a parameter that acts through its sum alone."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.delta = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
        self.shift = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.mean(dim=(2, 3)) @ (self.base + self.delta).T
        return self.head(torch.tanh(hidden + self.shift.sum()))


def batch() -> Batch:
    return Batch(torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))


def sam_by_hand(network: nn.Module, given: Batch) -> list[Tensor]:
    """The weights after a step of SAM, on a copy."""
    network = copy.deepcopy(network)
    params = list(network.parameters())
    grads = torch.autograd.grad(F.cross_entropy(network(given.images), given.labels), params)
    norm = torch.sqrt(sum((grad**2).sum() for grad in grads))
    before = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param.add_(RADIUS * grad / norm)
    grads = torch.autograd.grad(F.cross_entropy(network(given.images), given.labels), params)
    return [weight - LR * grad for weight, grad in zip(before, grads, strict=True)]


def test_gradients_that_share_memory_are_told_apart() -> None:
    torch.manual_seed(0)
    network, given = Summed().double(), batch()
    expected = sam_by_hand(network, given)
    step(network, given, sharp("sam"))
    for param, value in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("swp", ["tensor", "element", "suffix"])
def test_weights_come_back_to_the_bit(swp: str) -> None:
    torch.manual_seed(0)
    network = Summed().double()
    before = weights(network)
    Trial(network, lr=0.0).train(batch(), sharp(beta=0.5, gamma=0.5, swp=swp))
    assert same(weights(network), before)


@pytest.mark.parametrize("direction", ["gradient", "momentum", "previous"])
def test_a_draw_without_any_weight_is_a_step_without_perturbation(direction: str) -> None:
    """`norm` on a network without normalisation: refused by the command line, harmless here."""
    torch.manual_seed(0)
    network, given = Summed().double(), batch()
    plain = copy.deepcopy(network)
    step(network, given, sharp(swp="norm", direction=direction))
    step(plain, given, PLAIN)
    for param, value in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, value, rtol=1e-14, atol=1e-14)


class WithoutEnd(nn.Module):
    """A network whose last parameters have no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(12, 3), nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.used(images.flatten(1))


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("swp", ["suffix", "tensor"])
def test_a_draw_of_weights_without_a_part_in_the_loss_is_a_step_without_perturbation(swp: str, is_scaled: bool) -> None:
    torch.manual_seed(0)
    network, given, method = WithoutEnd().double(), batch(), sharp(beta=0.01, swp=swp)
    last = network.unused.bias
    seed = next(seed for seed in range(100) if draw(network, swp, 0.01, seed_step(seed, 0, 0, 0)).params[0] is last)
    trial = Trial(network, seed=seed, scaler=torch.amp.GradScaler("cpu") if is_scaled else None)
    before = weights(network)
    assert not trial.train(given, method).skipped
    at_w, at_w_plus_eps = trial.passes.weights
    assert same(at_w, before)
    assert same(at_w_plus_eps, before)
    assert not same(weights(network.used), before[:2])
