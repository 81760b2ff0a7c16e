"""Any network, any method, any batch: weights come back to the bit, the radius is met, and no step raises.

In float64, where rounding to a weight's own size does not blur the norm of a perturbation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esam_dist.data import Batch
from esam_dist.rule import Rule
from tests.steps import Trial, same, weights

BATCH, INPUTS, WIDTH, CLASSES = 6, 3, 4, 3
RADIUS = 0.3


@dataclass(frozen=True)
class Shape:
    """What a network is made of, and what a pass leaves out."""

    norm: str = "none"
    frozen: frozenset[str] = frozenset()
    tied: bool = False
    dropped: float = 0.0
    """Chance with which a pass skips the blocks, each by itself."""
    unused_last: bool = False
    """Whether the parameters registered last are never used."""
    only_a_matrix: bool = False


class Broken(torch.autograd.Function):
    """The identity, whose gradient is `value` everywhere."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.value), None


class Varied(nn.Module):
    """A stem, two blocks beside a shortcut, a norm, a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.broken_pass: int | None = None
        self.value = torch.nan
        self.passes = 0
        self.stem: nn.Module = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        if shape.tied:
            self.blocks[1].weight = self.blocks[0].weight
        kinds = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.norm = kinds[shape.norm](WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        if shape.unused_last:
            self.unused = nn.Linear(2, 2)
        if shape.only_a_matrix:
            self.stem, self.blocks, self.norm = nn.Identity(), nn.ModuleList(), nn.Identity()
            self.head = nn.Linear(INPUTS, CLASSES, bias=False)
        for name in shape.frozen:
            getattr(self, name).requires_grad_(requires_grad=False)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images.flatten(1))
        for block in self.blocks:
            if float(torch.rand(())) >= self.shape.dropped:
                features = features + block(features).tanh()
        logits = self.head(self.norm(features))
        if self.passes == self.broken_pass:
            logits = Broken.apply(logits, self.value)
        self.passes += 1
        return logits


SHAPES = st.builds(
    Shape,
    norm=st.sampled_from(["none", "layer", "batch"]),
    # Either end stays: a loss that depends on nothing has no gradient.
    frozen=st.frozensets(st.sampled_from(["stem", "blocks", "norm"])) | st.just(frozenset({"head", "norm"})),
    tied=st.booleans(),
    dropped=st.sampled_from([0.0, 0.5, 1.0]),
    unused_last=st.booleans(),
) | st.just(Shape(only_a_matrix=True))


def sharp(name: str, **choices: object) -> Rule:
    return Rule(name, rho=RADIUS, radius=RADIUS, **choices)


COMPARED = [
    sharp("sam"),
    sharp("asam", adaptive_eta=0.01),
    sharp("gsam", descent="gsam", alpha=0.3),
    sharp("looksam", descent="looksam", alpha=0.3),
    sharp("msam"),
]


@st.composite
def esam_rules(draw: st.DrawFn, shape: Shape) -> Rule:
    descent = draw(st.sampled_from(["kept", "kept", "kept", "recycled", "recycled_exact"]))
    choices: dict[str, object] = {"descent": descent, "gamma": draw(st.sampled_from([1 / BATCH, 0.5, 1.0]))}
    # The head that is last registered must be the one that is used.
    choices["score"] = draw(st.sampled_from(["forward", "loss", "random"] + ["head"] * (not shape.unused_last)))
    if descent == "kept":
        choices["swp"] = draw(st.sampled_from(["tensor", "element", "suffix", "norm"]))
        choices["beta"] = draw(st.sampled_from([0.2, 0.7, 1.0]))
        choices["scope"] = draw(st.sampled_from(["rank", "global"]))
    if choices.get("scope") == "global":
        choices["transport"] = draw(st.sampled_from(["scores", "thresholds"]))
        choices["capacity_factor"] = draw(st.sampled_from([0.0, 1.25]))
    if descent == "recycled_exact":
        # As a configuration must have it: two samples in each part, or one part.
        choices |= {"score": "random", "gamma": draw(st.sampled_from([0.5, 1.0]))}
    return sharp("esam", **choices)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, Rule]:
    shape = draw(SHAPES)
    return shape, draw(st.sampled_from(COMPARED) | esam_rules(shape))


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, INPUTS, 1, 1, generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(CLASSES, (BATCH,), generator=generator))


def norm_between(moved: list[Tensor], before: list[Tensor], rule: Rule) -> float:
    """L2; for ASAM in units of each weight's size."""
    parts = [after - was for after, was in zip(moved, before, strict=True)]
    if rule.adaptive_eta is not None:
        parts = [part / (was.abs() + rule.adaptive_eta) for part, was in zip(parts, before, strict=True)]
    return float(torch.cat([part.flatten() for part in parts]).norm())


def check_step(trial: Trial, batch: Batch, rule: Rule, seed: tuple[int, ...]) -> list[float]:
    """Make a step, assert what always holds, and return the norm of the perturbation in every pass."""
    module = trial.module
    before, first_pass, updates = weights(module), len(trial.passes.weights), len(trial.at_update)
    storages = [param.data_ptr() for param in module.parameters()]
    stats = trial.train(batch, rule, seed)
    assert same(trial.at_update[updates], before)
    assert [param.data_ptr() for param in module.parameters()] == storages
    after = weights(module)
    for param, was, now in zip(module.parameters(), before, after, strict=True):
        assert param.requires_grad or same([was], [now])
    norms = []
    for moved in trial.passes.weights[first_pass:]:
        norm = norm_between(moved, before, rule)
        assert norm == 0.0 or abs(norm - rule.radius) < 1e-9
        norms.append(norm)
        for param, was, inside in zip(module.parameters(), before, moved, strict=True):
            assert param.requires_grad or same([was], [inside])
    assert not (stats.skipped and any(norms))
    assert 1 <= float(stats.num_kept) <= BATCH
    return norms


some = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@some
@given(cases(), st.integers(0, 10**6))
def test_a_step_on_finite_data_meets_the_radius_and_restores_every_weight(case, seed):
    shape, rule = case
    torch.manual_seed(seed)
    trial = Trial(Varied(shape), momentum=0.9)
    check_step(trial, batch_of(seed), Rule(), (seed, 0))  # some momentum
    norms = check_step(trial, batch_of(seed + 1), rule, (seed, 1))
    if rule.name == "looksam":
        norms = check_step(trial, batch_of(seed + 2), replace(rule, reuses=True), (seed, 2))
        assert not any(norms)
    assert all(grad is None or grad.isfinite().all() for grads in trial.grads for grad in grads)
    # Without parts that a pass may leave out, or a draw may miss, there is something to perturb.
    never_empty = not (shape.dropped or shape.unused_last or rule.swp in ("element", "norm") or rule.name == "looksam")
    event(f"{rule.name}: {'perturbed' if any(norms) else 'not perturbed'}")
    assert any(norms) or not never_empty


@some
@given(cases(), st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.integers(0, 2))
def test_a_gradient_that_is_not_finite_in_any_pass_raises_nothing_and_perturbs_nothing(case, seed, value, broken):
    shape, rule = case
    torch.manual_seed(seed)
    network = Varied(shape)
    trial = Trial(network, momentum=0.9)
    check_step(trial, batch_of(seed), Rule(), (seed, 0))
    network.passes, network.broken_pass, network.value = 0, broken, value
    norms = check_step(trial, batch_of(seed + 1), rule, (seed, 1))
    if broken == 0 and rule.name != "msam":
        assert not any(norms)


@some
@given(cases(), st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf]), st.integers(0, BATCH - 1))
def test_an_image_that_is_not_finite_raises_nothing(case, seed, value, sample):
    shape, rule = case
    torch.manual_seed(seed)
    trial = Trial(Varied(shape), momentum=0.9)
    check_step(trial, batch_of(seed), Rule(), (seed, 0))
    batch = batch_of(seed + 1)
    batch.images[sample, 0] = value
    check_step(trial, batch, rule, (seed, 1))
