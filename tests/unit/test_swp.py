"""Which weights are drawn, how often, and that the rare ones are compensated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esam_dist.models import build_model
from esam_dist.step import swp


class Shared(nn.Module):
    """A weight in two places, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(requires_grad=False)


@settings(deadline=None)
@given(st.sampled_from(["tensor", "element", "suffix"]), st.floats(1e-6, 1.0), st.integers(0, 10**6))
def test_draw_is_never_empty_and_never_frozen_or_twice(mode, beta, seed):
    net = Shared()
    drawn = swp.draw(net, mode, beta, torch.Generator().manual_seed(seed))
    assert drawn.params
    assert len({id(param) for param in drawn.params}) == len(drawn.params)
    assert all(param.requires_grad for param in drawn.params)
    again = swp.draw(net, mode, beta, torch.Generator().manual_seed(seed))
    assert [id(param) for param in again.params] == [id(param) for param in drawn.params]


def test_beta_of_1_draws_everything_in_every_mode():
    net = build_model("cifar_resnet8", 10)
    for mode in ("tensor", "element", "suffix"):
        drawn = swp.draw(net, mode, 1.0, torch.Generator())
        assert len(drawn.params) == len(list(net.parameters()))
        assert drawn.factors is None
        assert drawn.keep_element == 1.0


@pytest.mark.parametrize("mode", ["tensor", "suffix"])
@pytest.mark.parametrize("beta", [0.25, 0.5, 0.8])
def test_share_of_tensors_drawn_is_beta_on_average(mode, beta):
    net = build_model("cifar_resnet20", 10)
    num, generator, draws = len(list(net.parameters())), torch.Generator().manual_seed(0), 4000
    mean = sum(len(swp.draw(net, mode, beta, generator).params) for _ in range(draws)) / draws / num
    # Standard error below 0.006 in both modes; a suffix is rounded up to whole tensors, half of one on average.
    assert mean == pytest.approx(beta + (0.5 / num if mode == "suffix" else 0.0), abs=0.025)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9])
def test_expectation_of_the_suffix_direction_over_all_cuts_is_the_gradient(beta):
    """Exact: the cut takes finitely many values, each on an interval of the uniform draw whose length is known."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(7)]
    num, power = len(params), beta / (1.0 - beta)
    expected = [0.0] * num
    for included in range(1, num + 1):
        low, high = ((included - 1) / num) ** power, (included / num) ** power
        drawn = swp.draw_suffix(params, beta, (low + high) / 2)
        assert [id(param) for param in drawn.params] == [id(param) for param in params[num - included :]]
        for place, factor in zip(range(num - included, num), drawn.factors, strict=True):
            expected[place] += (high - low) * factor
    assert expected == pytest.approx([1.0] * num, rel=1e-12)


def test_suffix_perturbs_the_last_tensors_in_the_order_of_depth():
    net = build_model("cifar_resnet8", 10)
    drawn = swp.draw_suffix(list(net.parameters()), 0.5, 0.3)
    names = [name for name, _ in net.named_parameters()]
    assert len(drawn.params) == -(-3 * len(names) // 10)
    assert drawn.params[-1] is net.head.bias


@pytest.mark.parametrize("keep", [2**-16, 0.3, 0.5, 1.0 - 2**-16])
def test_element_mask_keeps_the_share(keep):
    ones = [torch.ones(1001, 999), torch.ones(1_000_001)]
    swp.mask_elements(ones, keep, torch.Generator().manual_seed(0))
    kept = torch.cat([tensor.flatten() for tensor in ones])
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    # Five standard errors of that many independent draws.
    assert float(kept.double().mean()) == pytest.approx(keep, abs=5 * (keep * (1 - keep) / len(kept)) ** 0.5)


def test_element_masks_of_neighbours_are_independent():
    """The four lots of a random word, and those of words in a row."""
    ones = torch.ones(1_000_000)
    swp.mask_elements([ones], 0.5, torch.Generator().manual_seed(0))
    signs = 2 * ones - 1
    for distance in range(1, 9):
        assert abs(float((signs[distance:] * signs[:-distance]).mean())) < 5e-3


@pytest.mark.parametrize(("name", "modules"), [("cifar_resnet8", nn.BatchNorm2d), ("vit_b_16", nn.LayerNorm)])
def test_norm_mode_draws_all_affine_parameters_and_nothing_else(name, modules):
    with torch.device("meta"):
        net = build_model(name, 10)
    expected = {id(p) for m in net.modules() if isinstance(m, modules) for p in m.parameters()}
    assert {id(param) for param in swp.draw(net, "norm", 1.0, torch.Generator()).params} == expected
    assert swp.has_norms(net)
    assert not swp.has_norms(nn.Linear(2, 2))
