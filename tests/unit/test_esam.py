"""One step in one process, against hand results and plain autograd."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_dist import config
from esam_dist.data import Batch
from esam_dist.errors import UserError
from esam_dist.models import build_model
from esam_dist.rule import Rule
from esam_dist.score import find_head, head_rise, targets_of
from tests.steps import LR, Trial, digits_batch, sam_rule, same, step


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
    stats = step(network, Batch(x, torch.tensor([0])), sam_rule())
    sigmoid = 1.0 / (1.0 + torch.exp(x[0] @ w))  # 1 - p(class 0)
    g = -sigmoid * x[0]
    sharp = w + 0.3 * g / g.norm()
    expected = w + LR * x[0] / (1.0 + torch.exp(x[0] @ sharp))
    torch.testing.assert_close(network.w.detach(), expected, rtol=1e-14, atol=1e-14)
    rise = torch.log1p(torch.exp(-x[0] @ sharp)) - torch.log1p(torch.exp(-x[0] @ w))
    assert float(stats.sharpness) == pytest.approx(float(rise), rel=1e-12)


def test_beta_and_gamma_of_1_equal_sam_to_the_bit():
    batch, cfg = digits_batch(), config.parse({"method": {"beta": 1.0, "gamma": 1.0}}, "test")
    sam = config.parse({"method": {"name": "sam"}}, "test")
    networks = []
    for one in (cfg, sam):
        torch.manual_seed(0)
        networks.append(build_model("cifar_resnet8", 10))
        step(networks[-1], batch, Rule.at(one, step=0, epoch=0.0))
    for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_radius_of_0_is_a_plain_step_whatever_the_method():
    cfg = config.parse({"method": {"rho": [[0, 0.0], [5, 0.1]]}}, "test")
    assert Rule.at(cfg, step=0, epoch=4.9).is_plain
    assert not Rule.at(cfg, step=0, epoch=5.0).is_plain


def test_start_interval_and_late_share_choose_the_updates():
    def sharp(step, epoch, **method):
        cfg = config.parse({"train": {"epochs": 10}, "method": method}, "test")
        return not Rule.at(cfg, step=step, epoch=epoch).is_plain

    assert [sharp(step, 0.0, interval=3) for step in range(4)] == [True, False, False, True]
    assert [sharp(0, epoch, start_epoch=2.0) for epoch in (1.9, 2.0)] == [False, True]
    assert [sharp(0, epoch, late_share=0.25) for epoch in (7.4, 7.5)] == [False, True]


def test_gamma_warms_up_from_1():
    cfg = config.parse({"method": {"gamma": {"from": 1.0, "to": 0.5, "epochs": 10}}}, "test")
    assert [Rule.at(cfg, step=0, epoch=e).gamma for e in (0.0, 5.0, 10.0, 20.0)] == [1.0, 0.75, 0.5, 0.5]


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


@pytest.mark.parametrize("descent", ["kept", "recycled", "gsam", "looksam"])
def test_ascent_gradient_that_is_not_finite_is_skipped_and_counted(descent):
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
    stats = step(network, batch, sam_rule(descent=descent, alpha=0.5))
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
        step(network, digits_batch(), sam_rule())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_dropout_is_replayed_for_the_scores():
    """With a radius next to 0 nothing rises, unless dropout was drawn anew."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(192, 10), nn.Dropout(0.5)

        def forward(self, x):
            return self.linear(self.dropout(x.flatten(1)))

    stats = step(Network().double(), digits_batch(dtype=torch.float64), sam_rule(radius=1e-12, gamma=0.5))
    assert abs(float(stats.sharpness)) < 1e-9


def test_everything_random_is_a_function_of_the_seed():
    batch, outcomes = digits_batch(), []
    for seed in ((1, 2), (1, 2), (1, 3)):
        torch.manual_seed(0)
        network = build_model("cifar_resnet8", 10)
        torch.rand(len(outcomes))  # whatever was drawn before does not matter
        step(network, batch, sam_rule(beta=0.5, gamma=0.5), seed=seed)
        outcomes.append(torch.cat([param.detach().flatten() for param in network.parameters()]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize(("smoothing", "soft"), [(0.0, False), (0.0, True), (0.1, False), (0.1, True)])
def test_head_scores_are_the_first_order_rise_of_each_loss(smoothing, soft):
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)
    labels = torch.rand(5, 4, dtype=torch.float64).softmax(1) if soft else torch.tensor([0, 1, 2, 3, 0])
    losses = F.cross_entropy(head(hidden), labels, reduction="none", label_smoothing=smoothing)
    batch = torch.autograd.grad(losses.mean(), head.parameters(), retain_graph=True)
    each = [torch.autograd.grad(loss, head.parameters(), retain_graph=True) for loss in losses]
    expected = [sum((a * b).sum() for a, b in zip(mine, batch, strict=True)) for mine in each]
    logits = head(hidden).detach()
    scores = head_rise(logits, targets_of(labels, logits, smoothing), hidden)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "densenet121", "swin_t", "convnext_tiny", "cifar_resnet8"])
def test_head_is_found_without_being_told(name):
    with torch.device("meta"):
        network = build_model(name, 13)
    assert find_head(network).out_features == 13


def test_network_without_linear_head_is_refused_with_the_remedy():
    with torch.device("meta"):
        network = build_model("squeezenet1_1", 10)
    with pytest.raises(UserError, match=r"method\.score = forward"):
        find_head(network)


def test_parameters_that_a_pass_does_not_use_stay_unperturbed():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(192, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    trial = Trial(Branch())
    trial.train(digits_batch(), sam_rule())
    at_w, at_w_plus_eps = trial.passes.weights
    moved = [not torch.equal(*both) for both in zip(at_w, at_w_plus_eps, strict=True)]
    assert moved == [True, True, False, False]
    # Alone they are moved by the whole radius.
    difference = torch.cat([(b - a).flatten() for a, b in zip(at_w[:2], at_w_plus_eps[:2], strict=True)])
    assert float(difference.norm()) == pytest.approx(0.3, rel=1e-5)
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
    rule = sam_rule(gamma=0.5, scope="global", transport=transport, num_quantiles=12, score="loss")
    outcomes = []
    for one, factor in ((network, 1.5), (without, 0.0)):
        trial = Trial(one)
        stats = trial.train(batch, replace(rule, capacity_factor=factor))
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
    stats = step(network, Batch(images, torch.tensor([0, 1, 2, 3])), sam_rule(gamma=0.25, score="loss", **choices))
    assert stats.num_kept == 1
    assert all(param.isfinite().all() for param in network.parameters())


@pytest.mark.parametrize("gamma", [0.01, 0.34, 0.5, 0.99])
@pytest.mark.parametrize("scope", ["rank", "global"])
def test_the_right_number_of_samples_is_kept(gamma, scope):
    network = build_model("cifar_resnet8", 10)
    stats = step(network, digits_batch(), sam_rule(gamma=gamma, scope=scope))
    assert float(stats.num_kept) == max(1, int(gamma * 12 + 0.5))


def test_recycled_exact_with_nothing_left_to_recycle_is_sam():
    networks = []
    for rule in (sam_rule(descent="recycled_exact", score="random", gamma=0.97), sam_rule(name="sam")):
        torch.manual_seed(0)
        networks.append(build_model("cifar_resnet8", 10))
        step(networks[-1], digits_batch(8), rule)
    for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
