"""The score `head`: each loss's first-order rise through the classifier, whatever the loss; else one line says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_dist.errors import UserError
from esam_dist.models import build_model
from esam_dist.step.score import Head, find_head, head_rise
from tests.steps import Trial, digits_batch, sharp


def rise_by_autograd(head, losses):
    """`grad(loss_i) . grad(mean loss)` over the head's own parameters."""
    batch = torch.autograd.grad(losses.mean(), head.parameters(), retain_graph=True)
    each = [torch.autograd.grad(loss, head.parameters(), retain_graph=True) for loss in losses]
    return torch.stack([sum((a * b).sum() for a, b in zip(mine, batch, strict=True)) for mine in each])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("smoothing", "soft"), [(0.0, False), (0.0, True), (0.1, False), (0.1, True)])
def test_head_scores_are_the_first_order_rise_of_each_loss(smoothing, soft, bias):
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 4, bias=bias).double(), torch.randn(5, 6, dtype=torch.float64)
    labels = torch.rand(5, 4, dtype=torch.float64).softmax(1) if soft else torch.tensor([0, 1, 2, 3, 0])
    logits = head(hidden)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    (slopes,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    expected = rise_by_autograd(head, losses)
    torch.testing.assert_close(head_rise(slopes, hidden, bias=bias), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(head_rise(slopes, hidden, bias=not bias), expected)


class Ends(nn.Module):
    """A body, a head, and what comes behind it."""

    def __init__(self, end=None, bias=True):
        super().__init__()
        self.body, self.head = nn.Linear(7, 6), nn.Linear(6, 4, bias=bias)
        self.end = end or nn.Identity()

    def forward(self, x):
        return self.end(self.head(self.body(x).tanh()))


LABELS = torch.tensor([0, 1, 2, 3, 0])
LOSSES = {
    "cross-entropy": (None, lambda out: F.cross_entropy(out, LABELS, reduction="none")),
    "nll after log_softmax": (nn.LogSoftmax(dim=1), lambda out: F.nll_loss(out, LABELS, reduction="none")),
    "temperature": (nn.Softplus(), lambda out: F.cross_entropy(out / 3.0, LABELS, reduction="none")),
    "margin": (None, lambda out: F.multi_margin_loss(out, LABELS, reduction="none")),
    "squares": (None, lambda out: (out - F.one_hot(LABELS, 4)).square().sum(dim=1)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_head_scores_of_a_network_are_right_for_any_loss_and_whatever_follows_the_head(name, bias):
    torch.manual_seed(0)
    end, loss_fn = LOSSES[name]
    network = Ends(end, bias).double()
    head = Head(network)
    head.watch()
    outputs = network(torch.randn(5, 7, dtype=torch.float64))
    losses = loss_fn(outputs)
    expected = rise_by_autograd(network.head, losses)
    # Scores are in float32.
    torch.testing.assert_close(head.rise(outputs, losses).double(), expected, rtol=1e-5, atol=1e-6)


def test_scores_leave_the_graph_for_the_gradient_and_hold_no_activation():
    network = Ends()
    head = Head(network)
    head.watch()
    outputs = network(torch.randn(5, 7))
    losses = F.cross_entropy(outputs, LABELS, reduction="none")
    head.rise(outputs, losses)
    assert network.head.last_inputs is None
    assert network.head.last_outputs is None
    losses.mean().backward()
    network(torch.randn(5, 7))
    assert network.head.last_inputs is None, "an unwatched pass was noted"


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


class Beside(Ends):
    """Outputs that do not come from the last layer."""

    def __init__(self, calls_head):
        super().__init__()
        self.body, self.head, self.calls_head = nn.Linear(192, 10), nn.Linear(10, 10), calls_head

    def forward(self, x):
        outputs = self.body(x.flatten(1))
        if self.calls_head:
            self.head(outputs)
        # No tensor of the head's shape, by which a compiled network's outputs would be known.
        return torch.cat([outputs, outputs], dim=1)


class ByPixel(Ends):
    """A head that is called on every pixel."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(3, 10)

    def forward(self, x):
        return self.head(x.flatten(2).transpose(1, 2)).mean(dim=1)


class Flattened(ByPixel):
    """Likewise, with samples and pixels in one dimension."""

    def forward(self, x):
        pixels = self.head(x.flatten(2).transpose(1, 2).flatten(0, 1))
        return pixels.view(len(x), -1, 10).mean(dim=1)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Beside(calls_head=True), "does not depend on the classifier"),
        (Beside(calls_head=False), "took no part"),
        (ByPixel(), "not one output per class"),
        (Flattened(), "does not depend on the classifier sample by sample"),
    ],
    ids=["beside", "not called", "by pixel", "flattened"],
)
@pytest.mark.parametrize("name", ["esam", "recycled"])
def test_network_whose_loss_does_not_come_from_its_head_is_refused_in_one_line(network, reason, name):
    with pytest.raises(UserError, match=reason) as refused:
        Trial(network).train(digits_batch(), sharp(name, gamma=0.5, score="head"))
    assert str(refused.value).startswith("method.score = head")
    assert str(refused.value).endswith("use method.score = forward")
    assert "\n" not in str(refused.value)


def test_a_network_that_ends_in_log_softmax_keeps_the_samples_that_cross_entropy_keeps():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    ended = nn.Sequential(*plain, nn.LogSoftmax(dim=1))
    kept = []
    for network in (plain, ended):
        trial = Trial(network, lr=0.0)
        trial.train(digits_batch(), sharp(gamma=0.5, score="head"))
        kept.append(trial.passes.images[-1])
    # Cross-entropy of log-probabilities is that of the logits.
    assert torch.equal(*kept)
