"""BatchNorm's statistics move once for each pass over the data, at the unperturbed weights, whatever a step does."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from esam_dist.batchnorm import GroupStatistics, frozen_batchnorm
from esam_dist.data import Batch
from esam_dist.models import build_model
from esam_dist.rule import Rule
from tests.steps import Trial, digits_batch, sam_rule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.own = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        return self.own(self.norm(x))


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
def test_frozen_batchnorm_normalises_by_the_batch_and_moves_no_statistics(value):
    net = Net()
    x = torch.randn(6, 3)
    expected = net(x)
    before = copy.deepcopy(net.state_dict())
    with frozen_batchnorm(net):
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
        net(x * value)
    for key, buffer in net.state_dict().items():
        assert torch.equal(buffer, before[key])
    assert net.norm.track_running_stats
    assert not net.own.track_running_stats
    net(x)
    assert net.norm.num_batches_tracked == before["norm.num_batches_tracked"] + 1


def test_group_statistics_are_the_mean_of_what_each_group_would_leave():
    net, groups = nn.BatchNorm1d(2), [torch.randn(4, 2) for _ in range(3)]
    alone = []
    for group in groups:
        one = copy.deepcopy(net)
        one(group)
        alone.append(one.running_var)
    statistics = GroupStatistics(net)
    for group in groups:
        net(group)
        statistics.end_group()
    statistics.finish()
    torch.testing.assert_close(net.running_var, torch.stack(alone).mean(0))
    assert net.num_batches_tracked == 1


RULES = {
    **{f"score {score}": sam_rule(gamma=0.5, score=score) for score in ("forward", "head", "loss", "random")},
    **{f"swp {mode}": sam_rule(beta=0.5, gamma=0.5, swp=mode) for mode in ("tensor", "element", "suffix", "norm")},
    "sgd": Rule(),
    "sam": sam_rule(name="sam"),
    "asam": sam_rule(name="asam", adaptive_eta=0.01),
    "gsam": sam_rule(name="gsam", descent="gsam", alpha=0.2),
    "looksam": sam_rule(name="looksam", descent="looksam", alpha=0.2),
    "recycled": sam_rule(gamma=0.5, descent="recycled"),
    "recycled, random": sam_rule(gamma=0.5, descent="recycled", score="random"),
    "global": sam_rule(gamma=0.5, scope="global"),
    "thresholds": sam_rule(gamma=0.5, scope="global", transport="thresholds"),
    "capacity": sam_rule(gamma=0.5, scope="global", capacity_factor=1.5),
}


def after_passes(network, *batches):
    """The buffers of a copy that has seen the images at its present weights."""
    network = copy.deepcopy(network).train()
    for images in batches:
        network(images)
    return list(network.buffers())


def assert_buffers(network, expected):
    for (name, buffer), other in zip(network.named_buffers(), expected, strict=True):
        assert torch.equal(buffer, other), name


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model("cifar_resnet8", 10)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_statistics_move_once_at_the_unperturbed_weights(network, rule):
    batch = digits_batch()
    expected = after_passes(network, batch.images)
    assert not Trial(network).train(batch, rule).skipped
    assert_buffers(network, expected)


def test_between_two_perturbations_of_looksam_they_move_once(network):
    batch, rule, trial = digits_batch(), RULES["looksam"], Trial(network)
    trial.train(batch, rule)
    expected = after_passes(network, batch.images)
    trial.train(batch, replace(rule, reuses=True))
    assert_buffers(network, expected)


def test_with_recycled_exact_they_move_with_the_samples_that_are_not_kept(network):
    batch, trial = digits_batch(), Trial(network)
    start = copy.deepcopy(network)
    assert trial.train(batch, sam_rule(gamma=0.25, descent="recycled_exact", score="random")).num_kept == 3
    rest, kept, again = trial.passes.images
    assert (len(rest), len(kept)) == (9, 3)
    assert torch.equal(kept, again)
    assert_buffers(network, after_passes(start, rest))


def test_under_msam_they_move_at_the_perturbed_weights_the_only_ones_that_it_visits(network):
    batch, trial = digits_batch(), Trial(network, momentum=0.9)
    trial.train(batch, Rule())
    perturbed = copy.deepcopy(network)
    params = list(network.parameters())
    momentum = trial.momentum(params)
    norm = torch.cat([tensor.flatten() for tensor in momentum]).norm()
    with torch.no_grad():
        for param, direction in zip(perturbed.parameters(), momentum, strict=True):
            param.sub_(0.3 * direction / norm)
    trial.train(batch, sam_rule(name="msam"))
    for (name, buffer), expected in zip(network.named_buffers(), after_passes(perturbed, batch.images), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


@pytest.mark.parametrize("name", ["sam", "score forward", "recycled", "gsam"])
def test_they_are_the_mean_over_groups_that_each_moved_them_once(network, name):
    batch, rule = digits_batch(), replace(RULES[name], scope="rank")
    ends = [after_passes(network, images) for images in batch.images.split(4)]
    trial = Trial(network, accumulate=3)
    trial.train(batch, rule, group_size=4)
    for buffer, *others in zip(network.buffers(), *ends, strict=True):
        expected = torch.stack(others).mean(0) if buffer.is_floating_point() else others[0]
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("name", ["sam", "score forward", "recycled", "capacity"])
def test_every_micro_batch_of_an_update_moves_them_once(network, name):
    batch = digits_batch()
    halves = [
        Batch(images, labels) for images, labels in zip(batch.images.split(6), batch.labels.split(6), strict=True)
    ]
    expected = after_passes(network, *(half.images for half in halves))
    trial = Trial(network, accumulate=2)
    for micro, half in enumerate(halves):
        trial.train(half, RULES[name], seed=(0, micro))
    assert_buffers(network, expected)
