"""Losses by sample: against timm's and torch's own."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy as Theirs
from torch.nn import functional as F

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.losses import Weighted, balanced, build_loss
from esam_dist.step.score import head_rise
from esam_dist.train_keys import TrainKeys

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 1, 2, 3])
SOFT = torch.softmax(LOGITS.flip(0), dim=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms(smoothing):
    ours = build_loss(TrainKeys(loss="bce", label_smoothing=smoothing))(LOGITS, LABELS)
    assert ours.shape == (6,)
    torch.testing.assert_close(ours.mean(), Theirs(smoothing=smoothing)(LOGITS, LABELS))
    for sample in range(6):
        each = Theirs(smoothing=smoothing)(LOGITS[sample : sample + 1], LABELS[sample : sample + 1])
        torch.testing.assert_close(ours[sample], each)


def test_bce_takes_the_soft_labels_of_mixup():
    ours = build_loss(TrainKeys(loss="bce"))(LOGITS, SOFT)
    torch.testing.assert_close(ours.mean(), Theirs(smoothing=0.0)(LOGITS, SOFT))
    smoothed = build_loss(TrainKeys(loss="bce", label_smoothing=0.1))
    torch.testing.assert_close(smoothed(LOGITS, F.one_hot(LABELS, 4).double()), smoothed(LOGITS, LABELS))


def test_weights_of_classes_are_torchs_by_sample_and_sklearns_by_class():
    counts = torch.bincount(LABELS, minlength=4).tolist()
    weights = torch.tensor(balanced(counts))
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS.numpy())
    torch.testing.assert_close(weights.double(), torch.from_numpy(expected), rtol=1e-6, atol=0)
    loss = build_loss(TrainKeys(class_weights="balanced"), counts)
    theirs = F.cross_entropy(LOGITS, LABELS, weight=weights.double(), reduction="none")
    torch.testing.assert_close(loss(LOGITS, LABELS), theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss(LOGITS, F.one_hot(LABELS, 4).double()), theirs, rtol=1e-6, atol=0)


def test_over_the_whole_set_the_mean_weight_is_one_also_with_empty_classes():
    counts = [90, 0, 9, 1]
    weights = balanced(counts)
    assert sum(count * weight for count, weight in zip(counts, weights, strict=True)) == pytest.approx(100)
    assert weights[3] == pytest.approx(90 * weights[0])


def test_a_head_score_is_that_of_the_weighed_loss():
    # A sample of a rare class counts for more: its slopes, from which the score follows, are larger.
    logits = LOGITS.clone().requires_grad_()
    loss = Weighted(
        lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"), torch.tensor([9.0, 1, 1, 1])
    )
    (slopes,) = torch.autograd.grad(loss(logits, LABELS).sum(), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, LABELS, reduction="sum"), logits)
    torch.testing.assert_close(slopes[0], 9 * plain[0])
    assert head_rise(slopes, LOGITS, bias=True)[0] > head_rise(plain, LOGITS, bias=True)[0]


def test_nobody_knows_the_classes_of_a_stream():
    values = {"train": {"class_weights": "balanced"}, "data": {"stream": "pipe:cat x.tar", "stream_samples": 64}}
    with pytest.raises(UserError, match=r"train.class_weights = balanced .* data.stream"):
        config.parse(values, "test")
