"""What holds of a step whatever its method: weights come back, randomness is named, the right samples are kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_dist.data import Batch
from esam_dist.models import build_model
from tests.steps import LR, RADIUS, Trial, digits_batch, same, sharp, step


class BrokenOnce(torch.autograd.Function):
    """The identity, whose first gradient is nan."""

    broken = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        was, BrokenOnce.broken = BrokenOnce.broken, False
        return grad * torch.nan if was else grad


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "looksam", "esam", "recycled"])
def test_ascent_gradient_that_is_not_finite_is_skipped_and_counted(name):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x):
            return BrokenOnce.apply(self.linear(x.flatten(1)))

    BrokenOnce.broken = True
    torch.manual_seed(0)
    network, batch = Network(), digits_batch()
    plain = copy.deepcopy(network.linear)
    stats = step(network, batch, sharp(name))
    assert float(stats.skipped) == 1.0
    F.cross_entropy(plain(batch.images.flatten(1)), batch.labels).backward()
    for param, other in zip(network.linear.parameters(), plain.parameters(), strict=True):
        # As if there had been no sharpness: the descent gradient is the one at w.
        torch.testing.assert_close(param.detach(), (other - LR * other.grad).detach(), rtol=1e-6, atol=1e-7)


def test_weights_are_restored_when_the_descent_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(192, 10), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("out of memory")
            return self.linear(x.flatten(1))

    network = Fails()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        step(network, digits_batch(), sharp())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_dropout_is_replayed_for_the_scores():
    """With a radius next to 0 nothing rises, unless dropout was drawn anew."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(192, 10), nn.Dropout(0.5)

        def forward(self, x):
            return self.linear(self.dropout(x.flatten(1)))

    stats = step(Network().double(), digits_batch(dtype=torch.float64), sharp(rho=1e-12, gamma=0.5))
    assert abs(float(stats.sharpness)) < 1e-9


def test_everything_random_is_a_function_of_the_seed():
    batch, outcomes = digits_batch(), []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        network = build_model("cifar_resnet8", 10)
        torch.rand(len(outcomes))  # whatever was drawn before does not matter
        step(network, batch, sharp(beta=0.5, gamma=0.5), seed=seed)
        outcomes.append(torch.cat([param.detach().flatten() for param in network.parameters()]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_parameters_that_a_pass_does_not_use_stay_unperturbed():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(192, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    trial = Trial(Branch())
    trial.train(digits_batch(), sharp())
    at_w, at_w_plus_eps = trial.passes.weights
    moved = [not torch.equal(*both) for both in zip(at_w, at_w_plus_eps, strict=True)]
    assert moved == [True, True, False, False]
    # Alone they are moved by the whole radius.
    difference = torch.cat([(b - a).flatten() for a, b in zip(at_w[:2], at_w_plus_eps[:2], strict=True)])
    assert float(difference.norm()) == pytest.approx(RADIUS, rel=1e-5)
    assert same(trial.at_update[0], at_w)


class Linear(nn.Module):
    """No BatchNorm: what a sample is has no part in what others become."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("transport", ["scores", "thresholds"])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_padding_up_to_the_capacity_lets_no_sample_in_that_is_not_finite(place, transport):
    torch.manual_seed(0)
    network, batch = Linear(), digits_batch()
    without = copy.deepcopy(network)
    batch.images[place] = torch.nan
    keys = {"gamma": 0.5, "scope": "global", "transport": transport, "num_quantiles": 12, "score": "loss"}
    outcomes = []
    for one, factor in ((network, 1.5), (without, 0.0)):
        trial = Trial(one)
        stats = trial.train(batch, sharp(**keys, capacity_factor=factor))
        assert stats.skipped  # the sample has its part in the ascent
        assert stats.num_kept == 6
        assert all(grad.isfinite().all() for grad in trial.grads[0])
        outcomes.append(trial.grads[0])
    for padded, exact in zip(*outcomes, strict=True):
        torch.testing.assert_close(padded, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "choices",
    [{"scope": "rank"}, {"scope": "global"}, {"scope": "global", "capacity_factor": 1.0}],
    ids=["rank", "global", "capacity"],
)
def test_a_single_kept_sample_passes_a_network_whose_last_maps_are_single_pixels(choices):
    network = build_model("resnet18", 10)
    images = torch.randn(4, 3, 32, 32)
    stats = step(network, Batch(images, torch.tensor([0, 1, 2, 3])), sharp(gamma=0.25, score="loss", **choices))
    assert stats.num_kept == 1
    assert all(param.isfinite().all() for param in network.parameters())


@pytest.mark.parametrize("gamma", [0.01, 0.34, 0.5, 0.99])
@pytest.mark.parametrize("scope", ["rank", "global"])
def test_the_right_number_of_samples_is_kept(gamma, scope):
    network = build_model("cifar_resnet8", 10)
    stats = step(network, digits_batch(), sharp(gamma=gamma, scope=scope))
    assert float(stats.num_kept) == max(1, int(gamma * 12 + 0.5))
