"""All ranks of a run in one process, in float64, by the formulas of the papers and plain autograd.

Nothing of the package computes here; only what is drawn at random (which tensors, which masks) is taken from it, as
data. A replica's weights are a dictionary; nothing is perturbed in place, nothing is restored.

Shapes: W ranks, B samples per rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from esam_dist.rule import Rule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from esam_dist import swp
from esam_dist.randomness import seed_step
from tests.multiprocess.choice import choose, count_kept, padded

Weights = dict[str, Tensor]


@dataclass
class Simulation:
    """SGD with momentum, Nesterov's or not, L2 on everything, over W simulated ranks."""

    network: nn.Module
    lr: float
    momentum: float
    weight_decay: float
    clip: float = 0.0
    nesterov: bool = False
    shared: bool = False
    """One perturbation for all ranks, along the averaged gradient (ZeRO 3)."""
    velocity: Weights = field(default_factory=dict)
    flat: Weights | None = None
    kept: list[int] = field(default_factory=list)
    """Of each micro-batch: how many samples all ranks kept together."""

    def __post_init__(self) -> None:
        self.weights = {name: param.detach().clone() for name, param in self.network.named_parameters()}
        self.buffers = {name: buffer.detach().clone() for name, buffer in self.network.named_buffers()}

    def update(self, micro_batches: list[list[tuple[Tensor, Tensor]]], rule: Rule, seed: tuple[int, int]) -> None:
        """One update from `micro_batches[micro][rank]`."""
        total: Weights = {}
        for micro, batches in enumerate(micro_batches):
            grads, buffers = self.gradient(batches, rule, (*seed, micro))
            for name, grad in grads.items():
                total[name] = total.get(name, torch.zeros_like(grad)) + grad / len(micro_batches)
            self.per_rank_buffers = buffers
            self.buffers = {
                name: torch.stack([rank[name].double() for rank in buffers]).mean(0).to(self.buffers[name].dtype)
                for name in self.buffers
            }
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in total.values()))
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for name, grad in total.items():
            step = grad * factor + self.weight_decay * self.weights[name]
            if name in self.velocity:
                self.velocity[name] = self.momentum * self.velocity[name] + step
            else:
                self.velocity[name] = step.clone()
            step = step + self.momentum * self.velocity[name] if self.nesterov else self.velocity[name]
            self.weights[name] = self.weights[name] - self.lr * step

    def gradient(
        self, batches: list[tuple[Tensor, Tensor]], rule: Rule, seed: tuple[int, ...]
    ) -> tuple[Weights, list[Weights]]:
        """The gradient of one micro-batch over all ranks, and each rank's BatchNorm statistics after it."""
        W = len(batches)
        ranks: list[dict[str, Any]] = []
        for rank, batch in enumerate(batches):
            generator = seed_step(*seed, rank)
            ranks.append(self.ascend(batch, rule, generator))
        if self.shared and not rule.is_plain:
            self.share_perturbation(ranks, batches, rule)
        everything = [list(range(rank["size"])) for rank in ranks]
        kept = everything if rule.gamma >= 1.0 else choose([rank["scores"] for rank in ranks], rule)
        num_kept = sum(len(index) for index in kept)
        self.kept.append(num_kept)
        total = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        flats = []
        for (images, labels), rank, index in zip(batches, ranks, kept, strict=True):
            at = {name: value + rank["eps"].get(name, 0.0) for name, value in self.weights.items()}
            torch.set_rng_state(rank["rng_after"])
            at = {name: value.detach().requires_grad_() for name, value in at.items()}
            # A capacity fills the batch with samples of weight 0, which BatchNorm sees.
            run = padded(index, rule, len(labels))
            loss = self.losses(at, rank["buffers_before"] | {}, images[run], labels[run], rule)[: len(index)].sum()
            grads = dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))
            clean, size = rank["clean"], len(index)
            if rule.descent in ("gsam", "looksam"):
                sharp = {name: grad / size for name, grad in grads.items()}
                if rule.descent == "gsam":
                    c = dot(clean, sharp) / dot(sharp, sharp)
                    mine = {n: sharp[n] - rule.alpha * (clean[n] - c * sharp[n]) for n in sharp}
                elif rule.reuses and self.flat is not None:
                    ratio = math.sqrt(dot(clean, clean) / dot(self.flat, self.flat))
                    mine = {n: clean[n] + rule.alpha * ratio * self.flat[n] for n in clean}
                else:
                    c = dot(clean, sharp) / dot(clean, clean)
                    flats.append({n: sharp[n] - c * clean[n] for n in sharp})
                    mine = sharp
                for name in total:
                    total[name] += mine[name] / W
                continue
            for name in total:
                share = {"recycled": rule.gamma, "recycled_exact": size / len(labels)}.get(rule.descent, 1.0)
                total[name] += share * grads[name] / num_kept
                if rule.descent.startswith("recycled"):
                    total[name] += (1.0 - share) * rank["recycled"][name] / W
        if flats:
            self.flat = {name: torch.stack([flat[name] for flat in flats]).mean(0) for name in flats[0]}
        return total, [rank["buffers"] for rank in ranks]

    def share_perturbation(self, ranks: list[dict[str, Any]], batches: list[tuple[Tensor, Tensor]], rule: Rule) -> None:
        mean = {name: sum(rank["clean"][name] for rank in ranks) / len(ranks) for name in self.weights}
        eps = {name: rule.radius * grad / math.sqrt(dot(mean, mean)) for name, grad in mean.items()}
        for rank, (images, labels) in zip(ranks, batches, strict=True):
            rank["eps"] = eps
            if rule.gamma < 1.0:
                rank["scores"] = self.scores(rule, rank, images, labels, rank["loss_B"], rank["rng"], rank["random"])

    def ascend(self, batch: tuple[Tensor, Tensor], rule: Rule, generator: torch.Generator) -> dict[str, Any]:
        """One rank's passes at w, its perturbation, and its scores."""
        images, labels = batch
        buffers_before = {name: value.clone() for name, value in self.buffers.items()}
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        rng = torch.get_rng_state()
        drawn = swp.draw(self.network, rule.swp, rule.beta, generator)
        names = {param: name for name, param in self.network.named_parameters()}
        factors = drawn.factors or [1.0] * len(drawn.params)
        random = torch.rand(len(labels), generator=generator) if rule.score == "random" and rule.gamma < 1 else None
        leaves = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        if rule.descent == "recycled_exact":
            count = count_kept(rule.gamma, len(labels))
            chosen = sorted(range(len(labels)), key=lambda i: (-float(random[i]), i))[:count]
            rest = [i for i in range(len(labels)) if i not in chosen]
            chosen.sort()
            loss_rest = self.losses(leaves, buffers, images[rest], labels[rest], rule)
            loss_kept = self.losses(
                leaves, {k: v.clone() for k, v in buffers.items()}, images[chosen], labels[chosen], rule
            )
            recycled = gradient(loss_rest.mean(), leaves)
            other = gradient(loss_kept.mean(), leaves)
            clean = {n: recycled[n] + (count / len(labels)) * (other[n] - recycled[n]) for n in recycled}
            loss_B = torch.empty(len(labels), dtype=images.dtype)
            loss_B[rest], loss_B[chosen] = loss_rest.detach(), loss_kept.detach()
        else:
            losses = self.losses(leaves, buffers, images, labels, rule)
            clean = recycled = gradient(losses.mean(), leaves)
            loss_B = losses.detach()
        rng_after = torch.get_rng_state()
        direction = {names[p]: clean[names[p]] * f for p, f in zip(drawn.params, factors, strict=True)}
        if drawn.keep_element < 1.0:
            masks = [torch.ones_like(p) for p in drawn.params]
            swp.mask_elements(masks, drawn.keep_element, generator)
            direction = {names[p]: direction[names[p]] * mask for p, mask in zip(drawn.params, masks, strict=True)}
        if rule.name == "msam":
            direction = {name: -value for name, value in self.velocity.items()}
        if rule.adaptive_eta is not None:
            T = {name: self.weights[name].abs() + rule.adaptive_eta for name in direction}
            norm = math.sqrt(sum(float(((T[n] * direction[n]) ** 2).sum()) for n in direction))
            direction = {n: T[n] ** 2 * direction[n] for n in direction}
        else:
            norm = math.sqrt(dot(direction, direction)) if direction else 0.0
        eps = {n: rule.radius * d / norm for n, d in direction.items()} if norm > 0 else {}
        found = {
            "eps": eps,
            "clean": clean,
            "recycled": recycled,
            "buffers": buffers,
            "buffers_before": buffers_before,
            "rng_after": rng_after,
            "scores": None,
            "size": len(labels),
            "loss_B": loss_B,
            "rng": rng,
            "random": random,
        }
        if rule.is_plain or rule.name == "msam":
            # One forward only: it draws the dropout.
            found["rng_after"] = rng
        if rule.name == "msam":
            # ... and, perturbed as it is, moves the statistics.
            at = {name: value + eps.get(name, 0.0) for name, value in self.weights.items()}
            torch.set_rng_state(rng)
            found["buffers"] = {name: value.clone() for name, value in buffers_before.items()}
            self.losses(at, found["buffers"], images, labels, rule)
        if rule.gamma < 1.0:
            found["scores"] = self.scores(rule, found, images, labels, loss_B, rng, random)
        return found

    def scores(
        self,
        rule: Rule,
        found: dict[str, Any],
        images: Tensor,
        labels: Tensor,
        loss_B: Tensor,
        rng: Tensor,
        random: Tensor | None,
    ) -> list[float]:
        if rule.score == "random":
            assert random is not None
            return random.tolist()
        if rule.score == "loss":
            return loss_B.tolist()
        torch.set_rng_state(rng)
        scratch = {name: value.clone() for name, value in found["buffers_before"].items()}
        if rule.score == "forward":
            at = {name: value + found["eps"].get(name, 0.0) for name, value in self.weights.items()}
            with torch.no_grad():
                return (self.losses(at, scratch, images, labels, rule) - loss_B).tolist()
        # head: the inner product of each sample's gradient of the last layer with the batch's.
        leaves = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        losses = self.losses(leaves, scratch, images, labels, rule)
        head = [leaves["head.weight"], leaves["head.bias"]]
        mean = torch.autograd.grad(losses.mean(), head, retain_graph=True)
        each = [torch.autograd.grad(loss, head, retain_graph=True) for loss in losses]
        return [float(sum((a * b).sum() for a, b in zip(mine, mean, strict=True))) for mine in each]

    def losses(self, weights: Weights, buffers: Weights, images: Tensor, labels: Tensor, rule: Rule) -> Tensor:
        logits = functional_call(self.network, weights | buffers, (images,))
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=rule.label_smoothing)


def gradient(loss: Tensor, leaves: Weights) -> Weights:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))


def dot(left: Weights, right: Weights) -> float:
    return float(sum((left[name] * right[name]).sum() for name in left))
