"""The arithmetic of vectors over weights is that of the flat vectors, also over shards, and over no weight at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esam_dist.step.vector import Vector, owned

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), max_size=5)


def vectors(shapes, number=2):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    return [Vector(params, [torch.randn(shape, dtype=torch.float64) for shape in shapes]) for _ in range(number)]


def flat(vector):
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(tensor.flatten() for tensor in vector.tensors)])


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12, check_dtype=False)


@settings(deadline=None)
@given(SHAPES)
def test_arithmetic_is_that_of_the_flat_vectors_and_leaves_its_operands_alone(shapes):
    a, b = vectors(shapes)
    flat_a, flat_b = flat(a), flat(b)
    close(flat(a + b), flat_a + flat_b)
    close(flat(a - b), flat_a - flat_b)
    close(flat(a * 3.0), 3.0 * flat_a)
    close(flat(a * torch.tensor(3.0, dtype=torch.float64)), 3.0 * flat_a)
    close(flat(a.lerp(b, 0.3)), 0.7 * flat_a + 0.3 * flat_b)
    close(a.dot(b), flat_a @ flat_b)
    close(a.norm(), flat_a.norm())
    assert torch.equal(flat(a), flat_a)
    assert torch.equal(flat(b), flat_b)
    assert all((a + b).params[place] is param for place, param in enumerate(a.params))


@settings(deadline=None)
@given(SHAPES)
def test_what_ends_in_an_underscore_works_in_place(shapes):
    (a, b), (spoilt,) = vectors(shapes), vectors(shapes, 1)
    expected, memory = flat(a) * flat(b), [tensor.data_ptr() for tensor in a.tensors]
    assert a.mul_(b.tensors) is a
    close(flat(a), expected)
    for tensor, bad in zip(spoilt.tensors, (torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf), strict=False):
        tensor.view(-1)[0] = bad
    finite = torch.where(flat(spoilt).isfinite(), flat(spoilt), 0.0)
    assert spoilt.clear_() is spoilt
    assert torch.equal(flat(spoilt), finite)
    assert [tensor.data_ptr() for tensor in a.tensors] == memory


def test_dot_and_norm_over_shards_are_those_of_the_whole_vector():
    whole, other = vectors([(6,), (2, 4)])
    parts = [
        [Vector(v.params, [tensor.flatten().chunk(2)[rank] for tensor in v.tensors]) for v in (whole, other)]
        for rank in range(2)
    ]
    other_dot, other_square = parts[1][0].dot(parts[1][1]), parts[1][0].norm().square()
    for addend, value, expected in (
        (other_dot, lambda mine, yours: mine.dot(yours), whole.dot(other)),
        (other_square, lambda mine, yours: mine.norm(), whole.norm()),
    ):
        mine = Vector(whole.params, parts[0][0].tensors, lambda own, addend=addend: own + addend)
        close(value(mine, parts[0][1]), expected)
        # What is computed from it is over the same shards.
        close(value(mine * 1.0, parts[0][1]), expected)


def test_gradients_are_owned_where_they_share_memory_or_are_one_number_expanded():
    alone, shared = torch.randn(3), torch.randn(2, 2)
    expanded = torch.tensor(2.0).expand(4)
    own = owned([alone, None, shared, shared, expanded])
    assert own[0] is alone
    assert own[1] is None
    assert own[2] is shared
    own[3].zero_()
    own[4][0] = 0.0
    assert torch.equal(own[4], torch.tensor([0.0, 2.0, 2.0, 2.0]))
    assert shared.all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_an_interpolation_are_exact(share):
    a, b = vectors([(3,), (2, 2)])
    assert torch.equal(flat(a.lerp(b, share)), flat(b if share else a))
