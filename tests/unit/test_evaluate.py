"""Validation counts every sample once, on any number of ranks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_dist.data import Batch, open_validation
from esam_dist.data.keys import DataKeys
from esam_dist.evaluate import evaluate
from esam_dist.ranks import Ranks

CPU = torch.device("cpu")


class Given:
    """Batches that the test wrote."""

    def __init__(self, logits_BK, labels_B, batch_size):
        self._parts = [*zip(logits_BK.split(batch_size), labels_B.split(batch_size), strict=True)]

    def batches(self):
        return (Batch(logits_BK, labels_B) for logits_BK, labels_B in self._parts)


class Summed(Ranks):
    """A rank whose peers' sums the test brings."""

    def sum_(self, tensor):
        return tensor.add_(torch.tensor([3.0, 4.0, 5.0, 6.0]))


def test_accuracy_top5_and_loss_are_counted_by_hand():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]] * 4)
    labels = torch.tensor([0, 4, 5, 0])
    found = evaluate(nn.Identity(), Given(logits, labels, 3), Ranks())
    assert found.accuracy == 0.5
    assert found.top5_accuracy == 0.75
    assert found.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert found.num_samples == 4


def test_with_fewer_than_five_classes_every_label_is_among_the_top_five():
    found = evaluate(nn.Identity(), Given(torch.eye(3), torch.tensor([0, 0, 0]), 2), Ranks())
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.top5_accuracy == 1.0


def test_sums_of_other_ranks_are_part_of_every_share():
    found = evaluate(nn.Identity(), Given(torch.eye(6)[:2], torch.tensor([0, 1]), 2), Summed(world_size=2))
    assert (found.accuracy, found.top5_accuracy, found.num_samples) == (5 / 8, 6 / 8, 8)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_evaluated_in_evaluation_mode_and_left_as_it_was(training):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = Given(torch.randn(8, 6), torch.arange(8) % 6, 4)
    assert evaluate(model, data, Ranks()) == evaluate(model, data, Ranks())
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.extend(image.numpy().tobytes() for image in images)
        return torch.zeros(len(images), 10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_over_all_ranks_every_sample_is_counted_exactly_once(digits, world_size):
    cfg = DataKeys(path=digits, batch_size=64, workers=0, image_size=16)
    model, counted = Remembering(), []
    for rank in range(world_size):
        data = open_validation(cfg, rank=rank, world_size=world_size, device=CPU)
        counted.append(evaluate(model, data, Ranks()).num_samples)
    whole = Remembering()
    evaluate(whole, open_validation(cfg, rank=0, world_size=1, device=CPU), Ranks())
    # 359 samples: none of these numbers of ranks but 1 divides it.
    assert sum(counted) == len(whole.seen) == 359
    assert max(counted) - min(counted) <= 1
    assert sorted(model.seen) == sorted(whole.seen)
