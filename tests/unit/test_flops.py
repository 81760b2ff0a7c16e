"""What a step computes, to the last multiplication: docs/cost.md's model against PyTorch's FLOP counter.

The expectation is derived without autograd, from the shapes of each layer and from what a nudge of the weights moves:
a layer's weight gradient is computed if its weight is among the perturbed tensors, its input gradient if its input
depends on any of them. So the first layer never has one, and a suffix of the layers stops the backward pass.

B samples per batch, D of them kept, K classes, F inputs of the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esam_dist import swp
from esam_dist.clock import PhaseClock
from esam_dist.coordinate import Coordination
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.models import Classifier, build_model
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule

B, K, SIZE = 8, 10, 32


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=K
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet8": lambda: build_model("cifar_resnet8", K),
    "resnet18": lambda: build_model("resnet18", K),
    "vit": tiny_vit,
}


class Product(NamedTuple):
    """One multiplication of tensors in the forward pass, and what its gradients cost: FLOPs per sample."""

    reader: nn.Module
    """The module whose input it reads."""
    between: tuple[nn.Parameter, ...]
    """Parameters between that input and this product."""
    weight: nn.Parameter | None
    forward: int
    weight_gradient: int
    input_gradient: int


def products(network: nn.Module) -> list[Product]:
    """Every product of one forward pass, by the shapes that its layers see."""
    found: list[Product] = []

    def linear(reader: nn.Module, weight: nn.Parameter, rows: int, *between: nn.Parameter) -> None:
        flops = 2 * rows * weight.numel()
        found.append(Product(reader, between, weight, flops, flops, flops))

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            linear(module, module.weight, output[0, 0].numel())
        elif isinstance(module, nn.Linear):
            linear(module, module.weight, inputs[0].numel() // (len(inputs[0]) * module.in_features))
        elif isinstance(module, nn.MultiheadAttention):
            T, width = inputs[0].shape[1:]
            projection = (module.in_proj_weight, module.in_proj_bias)
            linear(module, module.in_proj_weight, T)
            # q k^T and its product with v; backwards, q k^T again, and two gradients for each of both.
            one = 2 * T * T * width
            found.append(Product(module, projection, None, 2 * one, 0, 5 * one))
            linear(module, module.out_proj.weight, T, *projection)

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    network(torch.randn(B, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return found


def readers_behind(network: nn.Module, params: Iterable[nn.Parameter]) -> set[nn.Module]:
    """The modules whose input moves when `params` do."""
    images = torch.randn(B, 3, SIZE, SIZE)

    def inputs() -> dict[nn.Module, Tensor]:
        seen: dict[nn.Module, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].clone()}))
            for module in network.modules()
        ]
        with torch.no_grad():
            network(images)
        for hook in hooks:
            hook.remove()
        return seen

    before = inputs()
    with torch.no_grad():
        saved = [(param, param.clone()) for param in params]
        for param, _ in saved:
            param.add_(torch.randn_like(param))
        after = inputs()
        for param, value in saved:
            param.copy_(value)
    return {module for module in before if not torch.equal(before[module], after[module])}


@dataclass(frozen=True)
class Cost:
    """FLOPs of the passes through one network, per sample."""

    network: nn.Module
    products: list[Product]

    @property
    def forward(self) -> int:
        return sum(product.forward for product in self.products)

    def backward(self, params: Iterable[nn.Parameter]) -> int:
        """For the gradient of `params` and no others."""
        chosen = set(params)
        behind = readers_behind(self.network, chosen)
        return sum(
            product.weight_gradient * (product.weight in chosen)
            + product.input_gradient * (product.reader in behind or not chosen.isdisjoint(product.between))
            for product in self.products
        )

    @property
    def sgd(self) -> int:
        return self.forward + self.backward(self.network.parameters())

    @property
    def head(self) -> int:
        """Of the head score: the head's gradient on the batch, and its product with the head's inputs."""
        return 2 * self.products[-1].forward

    def drawn(self, rule: Rule, seed: int = 0) -> list[nn.Parameter]:
        """What the step with `seed` perturbs."""
        return swp.draw(self.network, rule.swp, rule.beta, seed_step(seed)).params


@cache
def cost_of(name: str) -> Cost:
    torch.manual_seed(0)
    network = Classifier(NETWORKS[name]())
    # torchvision's ViT starts with a head of zeros, through which nothing would reach the loss.
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return Cost(network, products(network))


@pytest.fixture(params=NETWORKS)
def cost(request) -> Cost:
    return cost_of(request.param)


def counted(cost: Cost, rule: Rule, memory: Memory | None = None, seed: int = 0) -> int:
    """FLOPs of one step."""
    optimizer = torch.optim.SGD(cost.network.parameters(), lr=0.0, momentum=0.9)
    engine = NativeEngine(cost.network, optimizer, Ranks())
    batch = Batch(torch.randn(B, 3, SIZE, SIZE), torch.randint(K, (B,)))
    with FlopCounterMode(display=False) as counter:
        stats = esam_step(
            engine,
            batch,
            rule,
            lr=0.0,
            ranks=Ranks(),
            seed=(seed,),
            clock=PhaseClock(torch.device("cpu")),
            memory=memory or Memory(),
        )
    assert not stats.skipped
    return counter.get_total_flops()


def sharp(name: str, **choices: object) -> Rule:
    return Rule(name, rho=0.05, radius=0.05, **choices)


def paper(**choices: object) -> Rule:
    return sharp("esam", **{"beta": 0.5, "gamma": 0.5, **choices})


def test_sgd_skips_the_input_gradient_of_the_first_layer_and_no_other(cost):
    first = cost.products[0]
    recomputed = sum(p.input_gradient - 2 * p.forward for p in cost.products if p.weight is None)
    assert isinstance(first.reader, nn.Conv2d)
    assert cost.sgd == 3 * cost.forward - first.forward + recomputed
    assert counted(cost, Rule()) == B * cost.sgd


def test_msam_costs_what_sgd_costs(cost):
    assert counted(cost, sharp("msam")) == B * cost.sgd


@pytest.mark.parametrize(
    "rule",
    [
        sharp("sam"),
        sharp("asam", adaptive_eta=0.01),
        sharp("gsam", descent="gsam", alpha=0.2),
        sharp("looksam", descent="looksam", alpha=0.2),
        sharp("esam"),
    ],
    ids=lambda rule: rule.name,
)
def test_two_passes_over_the_whole_batch_cost_twice_sgd(cost, rule):
    assert counted(cost, rule) == 2 * B * cost.sgd


def test_looksam_costs_what_sgd_costs_once_it_has_a_flat_part(cost):
    memory = Memory()
    between = sharp("looksam", descent="looksam", alpha=0.2, reuses=True)
    assert counted(cost, between, memory) == 2 * B * cost.sgd
    assert counted(cost, between, memory) == B * cost.sgd


@pytest.mark.parametrize(
    ("mode", "seed"), [("tensor", 0), ("tensor", 1), ("suffix", 0), ("suffix", 1), ("suffix", 2), ("norm", 0)]
)
def test_the_ascent_computes_only_gradients_of_what_it_perturbs(cost, mode, seed):
    rule = paper(swp=mode, score="random")
    drawn = cost.drawn(rule, seed)
    ascent = cost.forward + cost.backward(drawn)
    assert counted(cost, rule, seed=seed) == B * ascent + B // 2 * cost.sgd
    weights = {product.weight for product in cost.products if product.weight is not None}
    undrawn = sum(p.weight_gradient for p in cost.products if p.weight in weights.difference(drawn))
    assert 0 < undrawn <= cost.sgd - ascent


def test_perturbing_normalisation_alone_leaves_out_every_weight_gradient_of_a_layer(cost):
    weights = sum(product.weight_gradient for product in cost.products)
    assert counted(cost, paper(swp="norm", score="random")) == B * (cost.sgd - weights) + B // 2 * cost.sgd


def test_the_paper_s_mask_on_elements_saves_nothing_in_the_ascent(cost):
    assert counted(cost, paper(swp="element", score="random")) == (B + B // 2) * cost.sgd


def test_a_suffix_of_the_last_tensor_goes_backwards_through_no_layer(cost):
    rule = paper(swp="suffix", beta=0.01, score="random")
    assert cost.drawn(rule) == [list(cost.network.parameters())[-1]]
    assert counted(cost, rule) == B * cost.forward + B // 2 * cost.sgd


@pytest.mark.parametrize("kept", [2, 4])
@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
def test_a_score_costs_a_forward_or_two_products_of_the_head_or_nothing(cost, score, kept):
    rule = paper(score=score, gamma=kept / B)
    passes = B * (cost.forward + cost.backward(cost.drawn(rule))) + kept * cost.sgd
    scoring = {"forward": B * cost.forward, "head": B * cost.head, "loss": 0, "random": 0}
    assert counted(cost, rule) == passes + scoring[score]


@pytest.mark.parametrize("transport", ["scores", "thresholds"])
def test_capacity_fixes_how_many_samples_the_descent_runs_on(cost, transport):
    rule = paper(beta=1.0, score="loss", gamma=0.25, scope="global", transport=transport, capacity_factor=1.5)
    assert counted(cost, rule) == (B + 3) * cost.sgd


@pytest.mark.parametrize("score", ["forward", "head", "random"])
def test_recycling_costs_no_pass_of_its_own(cost, score):
    rule = paper(beta=1.0, gamma=0.25, score=score, descent="recycled")
    scoring = {"forward": B * cost.forward, "head": B * cost.head, "random": 0}
    assert counted(cost, rule) == (B + 2) * cost.sgd + scoring[score]


def test_recycling_in_parts_costs_what_recycling_costs(cost):
    rule = paper(beta=1.0, gamma=0.25, score="random", descent="recycled_exact")
    assert counted(cost, rule) == (B + 2) * cost.sgd


def test_the_counter_sees_the_gradient_of_a_tensor_that_was_not_drawn(cost, monkeypatch):
    rule = paper(score="random")
    drawn, everything = cost.drawn(rule), list(cost.network.parameters())
    monkeypatch.setattr(swp, "draw", lambda *_: swp.Draw(everything))
    wasted = cost.backward(everything) - cost.backward(drawn)
    assert wasted > 0
    assert counted(cost, rule) == B * (cost.forward + cost.backward(drawn) + wasted) + B // 2 * cost.sgd


def test_the_counter_sees_a_scoring_forward_that_nobody_asked_for(cost, monkeypatch):
    rule = paper(beta=1.0, score="random")
    select = Coordination.end

    def scored_again(selection):
        cost.network(torch.randn(B, 3, SIZE, SIZE))
        return select(selection)

    monkeypatch.setattr(Coordination, "end", scored_again)
    assert counted(cost, rule) == (B + B // 2) * cost.sgd + B * cost.forward
