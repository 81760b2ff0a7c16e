"""A compiled network: the same step, and a bounded number of compilations."""

import copy

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from esam_dist.engine.native import NativeEngine
from esam_dist.losses import CrossEntropy
from esam_dist.models import Classifier, build_model, compile_network
from esam_dist.models.compiled import blocks
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step.choice import Choice
from esam_dist.step.swp import draw_suffix
from tests.steps import sharp

# The frontend and autograd of torch.compile, without the minutes of its C++ backend on a CPU.
QUICK = "aot_eager"


def train(network, method, *, compiled=False, steps, sizes, by_block=False, backend=QUICK, channels_last=False):
    classifier = Classifier(network, channels_last=channels_last)
    method.prepare(classifier)
    if compiled:
        compile_network(network, by_block=by_block, backend=backend)
    dtype = next(network.parameters()).dtype
    engine = NativeEngine(classifier, torch.optim.SGD(classifier.parameters(), 0.05), Ranks())
    trainer = SharpnessAware.over(engine, method, Ranks())
    graphs = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(sizes, 3, 8, 8, generator=generator).to(dtype)
        trainer.step(images, torch.randint(10, (sizes,), generator=generator), CrossEntropy(0.0))
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
    method = sharp(rho=0.1, gamma=0.5, score=score, scope="global", capacity_factor=1.0)
    train(eager, method, steps=4, sizes=8)
    graphs = train(compiled, method, compiled=True, steps=4, sizes=8)
    for one, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # One graph for the batch, one for the scores at w + eps (no gradient), one for the kept samples.
    assert graphs[0] <= (3 if score == "forward" else 2)
    assert graphs[-1] == graphs[0], "a later step compiled again"


@pytest.fixture
def limits():
    """torch's own limits of compilations, restored."""
    names = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield


@pytest.mark.usefixtures("limits")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_network_compiled_by_block_takes_the_same_steps_with_a_bounded_number_of_compilations():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager = build_model("cifar_resnet8", 10)
    compiled = copy.deepcopy(eager)
    method = sharp(rho=0.1, beta=0.5, gamma=0.5, swp="suffix")
    train(eager, method, steps=6, sizes=8)
    graphs = train(compiled, method, compiled=True, by_block=True, steps=6, sizes=8)
    for one, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Three blocks, all different; as above.
    assert graphs[0] <= 9
    assert graphs[-1] == graphs[0], "a later step compiled again"


@pytest.mark.usefixtures("limits")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("uniform", [0.02, 0.3, 0.6, 0.99])
def test_backward_of_a_network_compiled_by_block_stops_at_the_block_of_the_cut(uniform):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = build_model("cifar_resnet8", 10)
    backwards = []

    def as_is(graph, _):
        return make_boxed_func(graph.forward)

    def counted(graph, _):
        def run(*inputs):
            backwards.append(graph)
            return graph.forward(*inputs)

        return make_boxed_func(run)

    compile_network(network, by_block=True, backend=aot_autograd(fw_compiler=as_is, bw_compiler=counted))
    drawn = draw_suffix(list(network.parameters()), 0.5, uniform).params
    loss = F.cross_entropy(network(torch.randn(4, 3, 8, 8)), torch.randint(10, (4,)))
    torch.autograd.grad(loss, drawn)
    perturbed = {id(param) for param in drawn}
    reached = [block for block in blocks(network) if any(id(param) in perturbed for param in block.parameters())]
    assert len(backwards) == len(reached)


class WithDropout(nn.Module):
    """A convolution, normalisation, dropout and a head: what there is to compile."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.body(images).mean(dim=(2, 3)))


def noted_scores(monkeypatch):
    """A list to which every selection adds its scores."""
    scores = []
    begin = Choice.begin
    monkeypatch.setattr(Choice, "begin", lambda choice, score_B: scores.append(score_B) or begin(choice, score_B))
    return scores


@pytest.mark.usefixtures("limits")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_scores_of_a_compiled_network_with_dropout_are_those_of_the_network(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, scores = WithDropout().double(), noted_scores(monkeypatch)
    compiled = copy.deepcopy(eager)
    method = sharp(rho=0.1, gamma=0.5)
    train(eager, method, steps=3, sizes=8)
    train(compiled, method, compiled=True, steps=3, sizes=8)
    for one, other in zip(scores[:3], scores[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("limits")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", [QUICK, pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_of_a_compiled_network_is_replayed_for_the_scores(monkeypatch, backend):
    """With a radius next to 0 nothing rises, unless dropout was drawn anew: the loss without gradients has a graph of
    its own, which must draw what the other one drew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    scores = noted_scores(monkeypatch)
    method = sharp(rho=1e-12, gamma=0.5)
    train(WithDropout().double(), method, compiled=True, steps=3, sizes=8, backend=backend)
    assert all(score_B.abs().max() < 1e-9 for score_B in scores)
    assert len(scores) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("limits")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("swp", ["tensor", "suffix"])
def test_network_compiled_by_inductor_takes_the_same_steps(swp):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = build_model("cifar_resnet8", 10)
    compiled = copy.deepcopy(eager)
    method = sharp(rho=0.1, beta=0.5, gamma=0.5, swp=swp)
    train(eager, method, steps=3, sizes=8)
    train(compiled, method, compiled=True, steps=3, sizes=8, by_block=swp == "suffix", backend="inductor")
    for one, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        # Fused operations round otherwise: some 1e-7 of each number, through 8 layers and 3 steps.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_blocks_are_the_repeated_parts_and_hold_almost_all_weights():
    for name, number in (("resnet50", 16), ("vit_b_16", 12), ("wrn28_10", 12), ("convnext_tiny", 18), ("vgg11", 0)):
        with torch.device("meta"):
            network = build_model(name, 10)
        found = blocks(network)
        assert len(found) == number, name
        held = sum(param.numel() for block in found for param in block.parameters())
        assert number == 0 or held > 0.9 * sum(param.numel() for param in network.parameters())


@pytest.mark.usefixtures("limits")
def test_network_without_blocks_is_compiled_as_a_whole_and_says_so(caplog):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    compile_network(network, by_block=True, backend="aot_eager")
    assert "no repeated blocks" in caplog.text
    assert network._compiled_call_impl is not None


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


@pytest.mark.parametrize("keys", [{"swp": "element", "beta": 0.5}, {"swp": "tensor", "beta": 0.5, "score": "head"}])
def test_channels_last_takes_the_same_steps(keys):
    """Which weights a mask of elements spares is a matter of their place in the tensor, not in memory."""
    torch.manual_seed(0)
    network = build_model("cifar_resnet8", 10).double()
    other = copy.deepcopy(network)
    method = sharp(rho=0.1, gamma=0.5, **keys)
    train(network, method, steps=3, sizes=8)
    train(other, method, steps=3, sizes=8, channels_last=True)
    assert other.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    for one, same in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        # Convolutions sum in another order.
        torch.testing.assert_close(same, one, rtol=1e-10, atol=1e-12)
