"""BatchNorm's statistics move once for each pass over the data, at the unperturbed weights, whatever a step does."""

import copy

import pytest
import torch
from torch import nn

from esam_dist.data import Batch
from esam_dist.models import build_model
from esam_dist.step.batchnorm import GroupStatistics, frozen_batchnorm
from tests.steps import PLAIN, RADIUS, Trial, digits_batch, sharp


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


METHODS = {
    **{f"score {score}": sharp(gamma=0.5, score=score) for score in ("forward", "head", "loss", "random")},
    **{f"swp {mode}": sharp(beta=0.5, gamma=0.5, swp=mode) for mode in ("tensor", "element", "suffix", "norm")},
    **{name: sharp(name) for name in ("sam", "asam", "gsam", "looksam")},
    "sgd": PLAIN,
    "recycled": sharp("recycled", gamma=0.5, score="forward"),
    "recycled, random": sharp("recycled", gamma=0.5),
    "global": sharp(gamma=0.5, scope="global"),
    "thresholds": sharp(gamma=0.5, scope="global", transport="thresholds"),
    "capacity": sharp(gamma=0.5, scope="global", capacity_factor=1.5),
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


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_statistics_move_once_at_the_unperturbed_weights(network, method):
    batch = digits_batch()
    expected = after_passes(network, batch.images)
    assert not Trial(network).train(batch, method).skipped
    assert_buffers(network, expected)


@pytest.mark.parametrize("direction", ["average", "residual"])
@pytest.mark.parametrize("name", ["esam", "recycled"])
def test_along_a_moving_average_they_move_once_at_the_unperturbed_weights(network, name, direction):
    batch, trial = digits_batch(), Trial(network)
    for _ in range(2):
        expected = after_passes(network, batch.images)
        assert not trial.train(batch, sharp(name, gamma=0.5, direction=direction)).skipped
        assert_buffers(network, expected)


def test_between_two_perturbations_of_looksam_they_move_once(network):
    batch, trial = digits_batch(), Trial(network)
    trial.train(batch, METHODS["looksam"])
    expected = after_passes(network, batch.images)
    trial.train(batch, METHODS["looksam"])
    assert len(trial.passes.images) == 3
    assert_buffers(network, expected)


def test_under_exact_recycling_they_move_with_the_samples_that_are_not_kept(network):
    batch, trial = digits_batch(), Trial(network)
    start = copy.deepcopy(network)
    assert trial.train(batch, sharp("recycled", gamma=0.25, exact=True)).num_kept == 3
    rest, kept, again = trial.passes.images
    assert (len(rest), len(kept)) == (9, 3)
    assert torch.equal(kept, again)
    assert_buffers(network, after_passes(start, rest))


@pytest.mark.parametrize("method", [sharp("msam"), sharp(direction="momentum")], ids=["msam", "esam"])
def test_along_the_momentum_they_move_at_the_perturbed_weights_the_only_ones_that_are_visited(network, method):
    batch, trial = digits_batch(), Trial(network, momentum=0.9)
    trial.train(batch, PLAIN)
    perturbed = copy.deepcopy(network)
    momentum = trial.engine.momentum(list(network.parameters()))
    norm = torch.cat([tensor.flatten() for tensor in momentum]).norm()
    with torch.no_grad():
        for param, direction in zip(perturbed.parameters(), momentum, strict=True):
            param.sub_(RADIUS * direction / norm)
    trial.train(batch, method)
    for (name, buffer), expected in zip(network.named_buffers(), after_passes(perturbed, batch.images), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


@pytest.mark.parametrize("score", ["forward", "loss", "head"])
@pytest.mark.parametrize("direction", ["momentum", "previous"])
def test_scores_that_need_a_pass_at_the_unperturbed_weights_move_them_there(network, direction, score):
    batch, trial = digits_batch(), Trial(network, momentum=0.9)
    method = sharp(gamma=0.5, direction=direction, score=score)
    trial.train(batch, method)
    expected = after_passes(network, batch.images)
    trial.train(batch, method)
    assert_buffers(network, expected)


@pytest.mark.parametrize("name", ["sam", "score forward", "recycled", "gsam"])
def test_they_are_the_mean_over_groups_that_each_moved_them_once(network, name):
    batch = digits_batch()
    ends = [after_passes(network, images) for images in batch.images.split(4)]
    Trial(network, accumulate=3).train(batch, METHODS[name].model_copy(update={"group_size": 4}))
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
    for half in halves:
        trial.train(half, METHODS[name])
    assert_buffers(network, expected)
