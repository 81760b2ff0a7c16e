"""Stochastic weight perturbation: which weights a step perturbs, and what makes up for rarely drawn ones.

Source: section 3.2 of the ESAM paper (Du et al. 2022, arXiv 2110.03141) for `element` and, as released, `tensor`;
SAM-ON (Mueller et al. 2023, arXiv 2306.04226) for `norm`; `suffix` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from esam_dist.step.vector import Vector

Mode = Literal["tensor", "element", "suffix", "norm"]

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class Draw(NamedTuple):
    """The tensors that a step perturbs; gradients of the others are never computed."""

    params: list[nn.Parameter]
    factors: list[float] | None = None
    """By tensor: multiplies its gradient before the direction is normalised."""
    keep_element: float = 1.0
    """Probability with which each single weight of these tensors is perturbed."""


def draw(module: nn.Module, mode: Mode, beta: float, generator: torch.Generator) -> Draw:
    """The perturbed tensors of one step, drawn from `generator`; `beta` is the expected share.

    tensor    each tensor with probability beta, but at least one
    element   each weight with probability beta (the paper's mask): all gradients are needed
    suffix    the layers behind a random cut through the depth: the ascent's backward pass stops there
    norm      the affine parameters of all normalisation layers, whatever beta is
    """
    params = [param for param in module.parameters() if param.requires_grad]
    if mode == "norm":
        return Draw(_affine_of_norms(module))
    if beta >= 1.0:
        return Draw(params)
    if mode == "element":
        return Draw(params, keep_element=beta)
    if mode == "suffix":
        return draw_suffix(params, beta, float(torch.rand((), generator=generator)))
    lots = torch.rand(len(params), generator=generator)
    drawn = [param for param, lot in zip(params, lots.tolist(), strict=True) if lot < beta]
    return Draw(drawn or [params[int(lots.argmin())]])


def draw_suffix(params: Sequence[nn.Parameter], beta: float, uniform: float) -> Draw:
    """The last tensors, by a cut at the share `uniform ** ((1 - beta) / beta)` of the depth: beta on average.

    `params` come in the order of depth and `uniform` from [0, 1). Every tensor has some chance to be perturbed; its
    gradient is divided by that chance, so that the expectation over cuts of the direction before it is normalised is
    the gradient itself. Depth is counted in tensors; a cut always falls between two of them.
    """
    num = len(params)
    included = max(1, math.ceil(uniform ** ((1.0 - beta) / beta) * num))
    factors = [1.0 / suffix_chance(from_last, num, beta) for from_last in reversed(range(included))]
    return Draw(list(params[num - included :]), factors)


def compensated(gradient: Vector, drawn: Draw, generator: torch.Generator) -> Vector:
    """The gradient of the drawn tensors, in place: each times its factor, and its elements masked."""
    if drawn.factors is not None:
        by_param = dict(zip(drawn.params, drawn.factors, strict=True))
        torch._foreach_mul_(gradient.tensors, [by_param[param] for param in gradient.params])
    if drawn.keep_element < 1.0 and gradient.tensors:
        mask_elements(gradient.tensors, drawn.keep_element, generator)
    return gradient


def suffix_chance(from_last: int, num_tensors: int, beta: float) -> float:
    """The probability that `draw_suffix` includes the tensor with `from_last` tensors behind it."""
    return float(1.0 - (from_last / num_tensors) ** (beta / (1.0 - beta)))


def mask_elements(grads: Sequence[Tensor], keep: float, generator: torch.Generator) -> None:
    """Set each element to zero with probability `1 - keep`, in place; `keep` is met to within 2**-16.

    An element's lot is 16 bits of a random word, which takes a quarter of the time of one floating-point draw each.
    """
    if generator.device != grads[0].device:
        # Masks are drawn on the gradients' device, since one number per weight is too much to send there.
        seed = int(torch.randint(2**62, (), generator=generator))
        generator = torch.Generator(grads[0].device).manual_seed(seed)
    highest_kept = max(1, round(keep * 2**16)) - 1 - 2**15
    for grad in grads:
        words = torch.empty(-(-grad.numel() // 4), dtype=torch.int64, device=grad.device)
        lots = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: grad.numel()]
        # A product, not a fill: a gradient that is not finite has to show in the norm.
        grad.mul_(lots.view_as(grad) <= highest_kept)


def has_norms(module: nn.Module) -> bool:
    """Whether there is any trainable affine parameter of a normalisation layer."""
    return bool(_affine_of_norms(module))


def _affine_of_norms(module: nn.Module) -> list[nn.Parameter]:
    affine = [
        param
        for child in module.modules()
        if isinstance(child, NORMS)
        for param in child.parameters(recurse=False)
        if param.requires_grad
    ]
    # A parameter that two layers share is perturbed once.
    return list(dict.fromkeys(affine))
