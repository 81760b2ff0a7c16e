"""Perturbations: their norm, what they leave untouched, and that nothing of them stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esam_dist.step import perturbation
from esam_dist.step.vector import Vector


def parameters(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)


DTYPES = st.sampled_from([torch.float32, torch.float64])
some = settings(deadline=None)


def along(params, directions, radius):
    return perturbation.along(Vector(params, directions), radius)


def perturbed(params, eps, *, keep=False):
    return perturbation.perturbed([param.detach() for param in params], eps, keep=keep)


def norm_of(tensors):
    return float(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm())


@some
@given(SHAPES, st.integers(0, 1000), st.floats(1e-3, 1e3), st.booleans(), DTYPES)
def test_perturbation_has_the_radius_and_is_taken_back_to_the_bit(shapes, seed, radius, keeps, dtype):
    params = parameters(shapes, seed, dtype)
    before = [param.detach().clone() for param in params]
    grads = [torch.randn_like(param) for param in params]
    given_grads = [grad.clone() for grad in grads]
    storages = [param.data_ptr() for param in params]
    eps = along(params, grads, radius)
    with perturbed(params, eps, keep=keeps):
        moved = norm_of([param.double() - was.double() for param, was in zip(params, before, strict=True)])
        # A moved weight is rounded by half a unit in its own last place; norm and factor by a few in the radius'.
        rounding = torch.finfo(dtype).eps
        assert abs(moved - radius) <= rounding * (0.5 * norm_of(params) + 8 * radius)
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))
    assert [param.data_ptr() for param in params] == storages
    if keeps:
        assert all(torch.equal(grad, was) for grad, was in zip(grads, given_grads, strict=True))


@some
@given(SHAPES, st.integers(0, 1000), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.booleans(), st.data())
def test_one_entry_that_is_not_finite_anywhere_moves_nothing(shapes, seed, bad, keeps, data):
    params = parameters(shapes, seed)
    before = [param.detach().clone() for param in params]
    grads = [torch.randn_like(param) for param in params]
    spoilt = data.draw(st.sampled_from(grads)).view(-1)
    spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = bad
    eps = along(params, grads, 0.5)
    assert not eps.finite
    with perturbed(params, eps, keep=keeps):
        assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))


def test_a_perturbation_of_no_weights_is_none_and_finite():
    eps = along([], [], 0.5)
    assert eps.finite
    with perturbed([], eps):
        pass


def test_weights_are_restored_when_the_block_raises():
    (param,) = parameters([(3,)], 0)
    before = param.detach().clone()
    seen = []

    def fails():
        with perturbed([param], along([param], [torch.ones(3)], 1.0)):
            seen.append(param.detach().clone())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    assert not torch.equal(seen[0], before)
    assert torch.equal(param, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_direction_that_is_not_finite_moves_nothing_and_says_so(bad):
    params = parameters([(2, 2), (3,)], 1)
    before = [param.detach().clone() for param in params]
    grads = [torch.ones(2, 2), torch.ones(3)]
    grads[0][0, 1] = bad  # 3e38 is finite; its square, and so the norm, is not
    eps = along(params, grads, 0.5)
    assert not eps.finite
    with perturbed(params, eps):
        assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))


def test_direction_of_zeros_moves_nothing_and_is_finite():
    (param,) = parameters([(4,)], 2)
    before = param.detach().clone()
    eps = along([param], [torch.zeros(4)], 0.5)
    assert eps.finite
    with perturbed([param], eps):
        assert torch.equal(param, before)


@pytest.mark.parametrize(("scale", "expected"), [("none", 0.1), ("paper", 0.2), ("released", 0.4)])
def test_radius_grows_as_the_scale_says(scale, expected):
    assert perturbation.radius(0.1, 0.25, scale) == pytest.approx(expected, rel=1e-15)
