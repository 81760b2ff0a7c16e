"""Frozen weights: which they are, and that neither they nor their BatchNorm's statistics move."""

import pytest
import torch
from torch import nn

from esam_dist.averaging import recompute_batchnorm
from esam_dist.errors import UserError
from esam_dist.models import Classifier, build_model
from esam_dist.models.freeze import freeze
from esam_dist.ranks import Ranks
from esam_dist.step.batchnorm import GroupStatistics


def frozen(which, name="cifar_resnet8"):
    torch.manual_seed(0)
    classifier = Classifier(build_model(name, 10))
    freeze(classifier, which)
    return classifier


def names_of(classifier, *, trained):
    return [name for name, param in classifier.network.named_parameters() if param.requires_grad == trained]


def test_all_but_the_head():
    classifier = frozen("all_but_head")
    assert names_of(classifier, trained=True) == ["head.weight", "head.bias"]
    assert names_of(frozen("all_but_head", "mobilenet_v3_small"), trained=True) == [
        "classifier.3.weight",
        "classifier.3.bias",
    ]


def test_patterns_are_a_shells():
    assert all(name.startswith("stem.") for name in names_of(frozen(["stem.*"]), trained=False))
    assert all(
        "norm" in name or name.startswith("stem.1")
        for name in names_of(frozen(["*norm?.*", "stem.1.*"]), trained=False)
    )
    assert names_of(frozen([]), trained=False) == []


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (["stem"], "stem.[*]"),
        (["hed.weight"], "head.weight"),
        (["*"], "nothing to train"),
        ("head_only", "all_but_head|head"),
    ],
)
def test_a_pattern_that_fits_nothing_and_one_that_fits_all_are_refused(which, words):
    with pytest.raises(UserError, match=words) as caught:
        frozen(which)
    assert "model.freeze" in str(caught.value)


def norms_in_training(classifier):
    return [
        name
        for name, child in classifier.network.named_modules()
        if isinstance(child, nn.BatchNorm2d) and child.training
    ]


def test_a_batchnorm_that_is_frozen_whole_stays_in_evaluation_mode():
    classifier = frozen(["stem.*", "blocks.0.norm1.weight"])
    assert "stem.1" not in norms_in_training(classifier)
    assert "blocks.0.norm1" in norms_in_training(classifier)
    classifier.eval()
    assert norms_in_training(classifier) == []
    # As DDP and DeepSpeed do, by whatever holds it.
    nn.Sequential(classifier).train()
    assert "stem.1" not in norms_in_training(classifier)
    assert len(norms_in_training(classifier)) == len(norms_in_training(frozen([]))) - 1


def test_statistics_of_frozen_layers_stay_in_a_pass_in_groups_and_for_an_average():
    classifier = frozen(["stem.*"])
    stem, other = classifier.network.stem[1], classifier.network.blocks[0].norm1
    with torch.no_grad():
        stem.running_mean.copy_(torch.rand(16))
    before = stem.running_mean.clone()
    groups = GroupStatistics(classifier)
    for _ in range(3):
        classifier(torch.randn(4, 3, 16, 16))
        groups.end_group()
    groups.finish()
    moved = other.running_mean.clone()
    recompute_batchnorm(classifier, [torch.randn(4, 3, 16, 16)], Ranks())
    assert torch.equal(stem.running_mean, before)
    assert stem.num_batches_tracked == 0
    assert not torch.equal(moved, torch.zeros(16))
    assert not torch.equal(other.running_mean, moved)
    assert not stem.training


def test_one_without_parameters_is_held_by_the_name_of_its_statistics():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(2, 3, 2, 2))
    classifier = Classifier(network)
    freeze(classifier, ["0.*", "1.*"])
    assert not network[1].training
