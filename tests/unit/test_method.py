"""What methods do in a step, against hand results and plain autograd, and in which updates they do it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_dist import config
from esam_dist.data import Batch
from esam_dist.models import build_model
from esam_dist.step import Moment
from tests.steps import LR, RADIUS, Trial, digits_batch, sharp, step


class Quadratic(nn.Module):
    """Logits such that the cross-entropy of class 0 of two is log(1 + exp(-w . x))."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, x):
        margin = x @ self.w
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def test_sam_on_a_logistic_loss_equals_the_result_by_hand():
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    network = Quadratic()
    w = network.w.detach().clone()
    stats = step(network, Batch(x, torch.tensor([0])), sharp("sam"))
    sigmoid = 1.0 / (1.0 + torch.exp(x[0] @ w))  # 1 - p(class 0)
    g = -sigmoid * x[0]
    climbed = w + RADIUS * g / g.norm()
    expected = w + LR * x[0] / (1.0 + torch.exp(x[0] @ climbed))
    torch.testing.assert_close(network.w.detach(), expected, rtol=1e-14, atol=1e-14)
    rise = torch.log1p(torch.exp(-x[0] @ climbed)) - torch.log1p(torch.exp(-x[0] @ w))
    assert float(stats.sharpness) == pytest.approx(float(rise), rel=1e-12)


def test_beta_and_gamma_of_1_equal_sam_to_the_bit():
    batch, networks = digits_batch(), []
    for keys in ({"beta": 1.0, "gamma": 1.0}, {"name": "sam"}):
        torch.manual_seed(0)
        networks.append(build_model("cifar_resnet8", 10))
        step(networks[-1], batch, method_of(**keys))
    for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_exact_recycling_with_nothing_left_to_recycle_is_sam():
    networks = []
    for method in (sharp("recycled", exact=True, gamma=0.97), sharp("sam")):
        torch.manual_seed(0)
        networks.append(build_model("cifar_resnet8", 10))
        step(networks[-1], digits_batch(8), method)
    for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_adaptive_perturbation_is_the_formula_of_asam(eta):
    torch.manual_seed(0)
    network, batch = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double(), digits_batch(dtype=torch.float64)
    trial = Trial(network)
    grads = torch.autograd.grad(F.cross_entropy(network(batch.images), batch.labels), network.parameters())
    g = torch.cat([grad.flatten() for grad in grads])
    w = torch.cat([param.detach().flatten() for param in network.parameters()])
    T = torch.diag(w.abs() + eta)
    trial.train(batch, sharp("asam", eta=eta))
    at_w_plus_eps = torch.cat([weight.flatten() for weight in trial.passes.weights[1]])
    torch.testing.assert_close(at_w_plus_eps - w, RADIUS * (T @ T @ g) / (T @ g).norm(), rtol=1e-12, atol=1e-14)


def test_adaptive_perturbation_does_not_change_when_layers_are_rescaled():
    """ASAM's reason to be: scale one layer up and the next down, and the perturbed function stays the same."""
    torch.manual_seed(0)
    layers = [nn.Linear(192, 6, bias=False), nn.Linear(6, 10, bias=False)]
    network, batch = nn.Sequential(nn.Flatten(), *layers).double(), digits_batch(dtype=torch.float64)
    rescaled = copy.deepcopy(network)
    with torch.no_grad():
        rescaled[1].weight.mul_(4.0)
        rescaled[2].weight.div_(4.0)
    for name, is_invariant in (("asam", True), ("sam", False)):
        keys = {"eta": 0.0} if name == "asam" else {}
        rises = [float(step(copy.deepcopy(each), batch, sharp(name, **keys)).sharpness) for each in (network, rescaled)]
        assert (rises[0] == pytest.approx(rises[1], rel=1e-10)) == is_invariant


def method_of(**keys):
    """A method as a configuration has it."""
    return config.parse({"method": keys}, "test").method


def test_radius_of_0_is_a_plain_step_whatever_the_method():
    method = method_of(rho=[[0, 0.0], [5, 0.1]])
    assert [method.is_sharp(Moment(epoch=epoch)) for epoch in (4.9, 5.0)] == [False, True]
    trial = Trial(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    stats = trial.train(digits_batch(), sharp(rho=0.0, gamma=0.5))
    assert len(trial.passes.images) == 1
    assert stats.num_kept == 12


def test_phase_and_interval_choose_the_updates():
    every_third = method_of(interval=3)
    assert [every_third.is_sharp(Moment(update)) for update in range(4)] == [True, False, False, True]
    late, early = method_of(phase={"from": 0.75}), method_of(phase={"to": 0.75})
    assert [late.is_sharp(Moment(share=share)) for share in (0.0, 0.74, 0.75, 1.0)] == [False, False, True, True]
    assert [early.is_sharp(Moment(share=share)) for share in (0.0, 0.74, 0.75, 1.0)] == [True, True, False, False]
    # The last update may lie at the very end.
    assert method_of().is_sharp(Moment(share=1.0))


def test_looksam_is_sharp_between_two_perturbations_too():
    looksam = method_of(name="looksam", interval=3, phase={"from": 0.5})
    assert [looksam.is_sharp(Moment(update, share=0.5)) for update in range(4)] == [True] * 4
    assert not looksam.is_sharp(Moment(3, share=0.4))


def test_gamma_warms_up_from_1():
    method = method_of(gamma={"from": 1.0, "to": 0.5, "epochs": 10})
    assert [method.values(Moment(epoch=epoch))["gamma"] for epoch in (0.0, 5.0, 10.0, 20.0)] == [1.0, 0.75, 0.5, 0.5]


def test_a_step_reads_its_schedules_at_its_moment():
    network, batch = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), digits_batch()
    method = method_of(gamma={"from": 1.0, "to": 0.5, "epochs": 10}, rho=[[0, 0.3], [5, 0.6]], beta=1.0)
    for epoch, kept, radius in ((0.0, 12, 0.3), (5.0, 9, 0.6), (10.0, 6, 0.6)):
        trial = Trial(network)
        assert trial.train(batch, method, Moment(epoch=epoch)).num_kept == kept
        at_w, *perturbed_passes = trial.passes.weights
        for moved in perturbed_passes:
            eps = torch.cat([(now - was).flatten() for now, was in zip(moved, at_w, strict=True)])
            assert float(eps.norm()) == pytest.approx(radius, rel=1e-5)
