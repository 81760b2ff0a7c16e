"""Any network, any method, any batch: weights come back to the bit, the radius is met, and no step raises.

In float64, where rounding to a weight's own size does not blur the norm of a perturbation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esam_dist.data import Batch
from esam_dist.methods import ASAM, ESAM, Method
from tests.steps import PLAIN, RADIUS, Trial, same, sharp, weights

BATCH, INPUTS, WIDTH, CLASSES = 6, 3, 4, 3
WITHOUT_A_PASS = ("momentum", "previous")


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


COMPARED = [sharp("sam"), sharp("asam"), sharp("gsam", alpha=0.3), sharp("looksam", alpha=0.3), sharp("msam")]


@st.composite
def selective_methods(draw: st.DrawFn, shape: Shape) -> Method:
    name = draw(st.sampled_from(["esam", "esam", "esam", "recycled", "recycled"]))
    keys: dict[str, object] = {"gamma": draw(st.sampled_from([1 / BATCH, 0.5, 1.0]))}
    # The head that is last registered must be the one that is used.
    keys["score"] = draw(st.sampled_from(["forward", "loss", "random"] + ["head"] * (not shape.unused_last)))
    keys["direction"] = draw(st.sampled_from(["gradient", "gradient", "momentum", "previous", "average", "residual"]))
    if name == "esam" and keys["direction"] not in ("average", "residual"):
        keys["swp"] = draw(st.sampled_from(["tensor", "element", "suffix", "norm"]))
        keys["beta"] = draw(st.sampled_from([0.2, 0.7, 1.0]))
    keys["scope"] = draw(st.sampled_from(["rank", "global"]))
    if keys["scope"] == "global":
        keys["transport"] = draw(st.sampled_from(["scores", "thresholds"]))
        keys["capacity_factor"] = draw(st.sampled_from([0.0, 1.25]))
    if name == "recycled" and draw(st.booleans()):
        # As a configuration must have it: two samples in each part, or one part.
        gamma = draw(st.sampled_from([0.5, 1.0]))
        keys = {"exact": True, "gamma": gamma, "direction": keys["direction"]}
    return sharp(name, **keys)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, Method]:
    shape = draw(SHAPES)
    return shape, draw(st.sampled_from(COMPARED) | selective_methods(shape))


def climbs_along(method: Method) -> str:
    return "momentum" if method.name == "msam" else getattr(method, "direction", "gradient")


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, INPUTS, 1, 1, generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(CLASSES, (BATCH,), generator=generator))


def norm_between(moved: list[Tensor], before: list[Tensor], method: Method) -> float:
    """L2; for ASAM in units of each weight's size."""
    parts = [after - was for after, was in zip(moved, before, strict=True)]
    if isinstance(method, ASAM):
        parts = [part / (was.abs() + method.eta) for part, was in zip(parts, before, strict=True)]
    return float(torch.cat([part.flatten() for part in parts]).norm())


def check_step(trial: Trial, batch: Batch, method: Method) -> list[float]:
    """Make a step, assert what always holds, and return the norm of the perturbation in every pass."""
    module = trial.module
    before, first_pass, updates = weights(module), len(trial.passes.weights), len(trial.at_update)
    storages = [param.data_ptr() for param in module.parameters()]
    stats = trial.train(batch, method)
    assert same(trial.at_update[updates], before)
    assert [param.data_ptr() for param in module.parameters()] == storages
    after = weights(module)
    for param, was, now in zip(module.parameters(), before, after, strict=True):
        assert param.requires_grad or same([was], [now])
    norms = []
    for moved in trial.passes.weights[first_pass:]:
        norm = norm_between(moved, before, method)
        assert norm == 0.0 or abs(norm - RADIUS) < 1e-9
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
    shape, method = case
    torch.manual_seed(seed)
    trial = Trial(Varied(shape), momentum=0.9, seed=seed)
    check_step(trial, batch_of(seed), PLAIN)  # some momentum
    norms = check_step(trial, batch_of(seed + 1), method)
    again = check_step(trial, batch_of(seed + 2), method)
    if method.name == "looksam":
        assert not any(again)
    if climbs_along(method) == "previous":
        assert not any(norms)
        norms = again
    assert all(grad is None or grad.isfinite().all() for grads in trial.grads for grad in grads)
    # Without parts that a pass may leave out, or a draw may miss, there is something to perturb.
    may_miss = isinstance(method, ESAM) and method.swp in ("element", "norm")
    never_empty = not (shape.dropped or shape.unused_last or may_miss)
    event(f"{method.name}, {climbs_along(method)}: {'perturbed' if any(norms) else 'not perturbed'}")
    assert any(norms) or not never_empty


@some
@given(cases(), st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.integers(0, 2))
def test_a_gradient_that_is_not_finite_in_any_pass_raises_nothing_and_perturbs_nothing(case, seed, value, broken):
    shape, method = case
    torch.manual_seed(seed)
    network = Varied(shape)
    trial = Trial(network, momentum=0.9, seed=seed)
    check_step(trial, batch_of(seed), PLAIN)
    network.passes, network.broken_pass, network.value = 0, broken, value
    norms = check_step(trial, batch_of(seed + 1), method)
    if broken == 0 and climbs_along(method) not in WITHOUT_A_PASS:
        assert not any(norms)


@some
@given(cases(), st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf]), st.integers(0, BATCH - 1))
def test_an_image_that_is_not_finite_raises_nothing(case, seed, value, sample):
    shape, method = case
    torch.manual_seed(seed)
    trial = Trial(Varied(shape), momentum=0.9, seed=seed)
    check_step(trial, batch_of(seed), PLAIN)
    batch = batch_of(seed + 1)
    batch.images[sample, 0] = value
    check_step(trial, batch, method)
