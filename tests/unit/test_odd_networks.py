"""Networks whose gradients share memory, or have none: weights come back to the bit, and the step is the formula's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule

RADIUS, LR = 0.3, 0.1


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


def step(network: nn.Module, given: Batch, rule: Rule, lr: float) -> None:
    engine = NativeEngine(network, torch.optim.SGD(network.parameters(), lr=lr), Ranks())
    clock = PhaseClock(torch.device("cpu"))
    esam_step(engine, given, rule, lr=lr, ranks=Ranks(), seed=(0,), clock=clock, memory=Memory())


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
    step(network, given, Rule("sam", rho=RADIUS, radius=RADIUS), LR)
    for param, value in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("swp", ["tensor", "element", "suffix"])
def test_weights_come_back_to_the_bit(swp: str) -> None:
    torch.manual_seed(0)
    network = Summed().double()
    before = [param.detach().clone() for param in network.parameters()]
    step(network, batch(), Rule("esam", rho=RADIUS, radius=RADIUS, beta=0.5, gamma=0.5, swp=swp), lr=0.0)
    assert all(torch.equal(param, value) for param, value in zip(network.parameters(), before, strict=True))


def test_a_draw_without_any_weight_is_a_step_without_perturbation() -> None:
    """`norm` on a network without normalisation: refused by the command line, harmless here."""
    torch.manual_seed(0)
    network, given = Summed().double(), batch()
    plain = copy.deepcopy(network)
    step(network, given, Rule("esam", rho=RADIUS, radius=RADIUS, swp="norm"), LR)
    step(plain, given, Rule(), LR)
    for param, value in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, value, rtol=1e-14, atol=1e-14)
