"""What the passes through a network cost, derived without autograd: docs/cost.md's model.

From the shapes of each layer, and from what a nudge of the weights moves: a layer's weight gradient is computed if its
weight is among the perturbed tensors, its input gradient if its input depends on any of them. So the first layer never
has one, and a suffix of the layers stops the backward pass.

B samples per batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from esam_dist.methods import ESAM
from esam_dist.models import Classifier, build_model
from esam_dist.randomness import seed_step
from esam_dist.step import swp

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

    def drawn(self, method: ESAM, seed: int = 0) -> list[nn.Parameter]:
        """What the first step of a training with `seed` perturbs."""
        return swp.draw(self.network, method.swp, method.beta(0.0), seed_step(seed, 0, 0, 0)).params


@cache
def cost_of(name: str) -> Cost:
    torch.manual_seed(0)
    network = Classifier(NETWORKS[name]())
    # torchvision's ViT starts with a head of zeros, through which nothing would reach the loss.
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return Cost(network, products(network))
