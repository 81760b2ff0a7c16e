"""A compiled network: the same step, and a bounded number of compilations."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn

from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.models import Classifier, build_model
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule
from esam_dist.score import watched_head


def train(network, rule, *, compiled, steps, sizes):
    classifier = Classifier(network)
    if rule.score == "head":
        watched_head(classifier)
    if compiled:
        # The frontend and autograd of torch.compile, without the minutes of its C++ backend on a CPU.
        network.compile(backend="aot_eager")
    engine = NativeEngine(classifier, torch.optim.SGD(classifier.parameters(), 0.05), Ranks())
    graphs = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(sizes, 3, 8, 8, generator=generator)
        batch = Batch(images, torch.randint(10, (sizes,), generator=generator))
        esam_step(
            engine,
            batch,
            rule,
            lr=0.05,
            ranks=Ranks(),
            seed=(0, step),
            clock=PhaseClock(torch.device("cpu")),
            memory=Memory(),
        )
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("score", ["forward", "head"])
def test_compiled_network_takes_the_same_steps_with_a_bounded_number_of_compilations(score):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager = build_model("cifar_resnet8", 10)
    compiled = copy.deepcopy(eager)
    rule = Rule(name="esam", rho=0.1, radius=0.1, gamma=0.5, score=score, scope="global", capacity_factor=1.0)
    train(eager, rule, compiled=False, steps=4, sizes=8)
    graphs = train(compiled, rule, compiled=True, steps=4, sizes=8)
    for one, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # One graph for the batch, one for the scores at w + eps (no gradient), one for the kept samples.
    assert graphs[0] <= (3 if score == "forward" else 2)
    assert graphs[-1] == graphs[0], "a later step compiled again"


def test_channels_last_changes_the_layout_and_not_the_result():
    torch.manual_seed(0)
    network = build_model("cifar_resnet8", 10).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = Classifier(copy.deepcopy(network))(images)
    classifier = Classifier(network, channels_last=True)
    assert next(m for m in network.modules() if isinstance(m, nn.Conv2d)).weight.is_contiguous(
        memory_format=torch.channels_last
    )
    torch.testing.assert_close(classifier(images), expected, rtol=1e-12, atol=1e-12)
