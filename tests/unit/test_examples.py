"""Inputs and targets of any structure are cut at the samples; a loss of a wrong shape is refused in one line."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_dist.engine.native import NativeEngine
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step.examples import Examples, call
from tests.steps import sharp, weights


class Views(NamedTuple):
    """Two images of each sample, and what is none of the samples'."""

    near: torch.Tensor
    far: torch.Tensor
    scale: float = 2.0


NEAR, FAR, LABELS = torch.randn(6, 4), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
TREES = {
    "tensor": NEAR,
    "tuple": (NEAR, FAR),
    "list": [NEAR, FAR],
    "named tuple": Views(NEAR, FAR),
    "dict": {"near": NEAR, "far": FAR},
    "nested": {"views": (NEAR, [FAR, {"again": NEAR}]), "flag": True, "nothing": None},
    "no tensor first": (None, "name", (NEAR, FAR)),
}


def leaves(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for child in tree for leaf in leaves(child)] if isinstance(tree, tuple | list) else [tree]


def kind(tree):
    """The structure, tensors aside."""
    if isinstance(tree, dict):
        return {key: kind(value) for key, value in tree.items()}
    return (type(tree), [kind(child) for child in tree]) if isinstance(tree, tuple | list) else type(tree)


@pytest.mark.parametrize("index", [torch.tensor([4, 0, 4]), slice(1, 3)], ids=["positions", "slice"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_samples_are_taken_from_every_tensor_of_a_tree_whose_structure_stays(tree, index):
    examples = Examples(tree, tree, lambda outputs, targets: outputs)
    part = examples[index]
    assert len(examples) == 6
    assert len(part) == len(NEAR[index])
    for taken in (part.inputs, part.targets):
        assert kind(taken) == kind(tree)
        for leaf, whole in zip(leaves(taken), leaves(tree), strict=True):
            assert torch.equal(leaf, whole[index]) if isinstance(whole, torch.Tensor) else leaf == whole


def test_a_tuple_is_the_arguments_a_dict_the_keyword_arguments_and_all_else_the_one_argument():
    def module(*args, **kwargs):
        return args, kwargs

    assert call(module, (1, 2)) == ((1, 2), {})
    assert call(module, {"near": 1}) == ((), {"near": 1})
    assert call(module, [1, 2]) == (([1, 2],), {})
    assert call(module, 1) == ((1,), {})


@pytest.mark.parametrize("inputs", [None, "text", [], {}, {"names": ["a"]}])
def test_inputs_without_any_tensor_are_refused_in_one_line(inputs):
    with pytest.raises(UserError, match="give a tensor, or a tuple, list or dict that holds tensors") as refused:
        len(Examples(inputs, NEAR, lambda outputs, targets: outputs))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tree", [(["a"], NEAR), {"names": [], "near": NEAR}, ((), {}, [None], NEAR)])
def test_the_first_tensor_is_found_behind_branches_that_hold_none(tree):
    assert len(Examples(tree, NEAR, lambda outputs, targets: outputs)) == 6


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, near, far, scale=2.0):
        return {"logits": self.first(near) + scale * self.second(far)}


def losses(outputs, targets):
    return F.cross_entropy(outputs["logits"], targets["label"], reduction="none")


def trainer_of(network, method):
    return SharpnessAware.over(
        NativeEngine(network, torch.optim.SGD(network.parameters(), 0.1), Ranks()), method, Ranks()
    )


@pytest.mark.parametrize(
    "method", [sharp("gsam"), sharp(beta=0.5, gamma=0.5), sharp("recycled", gamma=0.5, exact=True)]
)
def test_a_step_on_nested_inputs_is_that_on_the_tensors_in_them(method):
    targets, ends = {"label": LABELS}, []
    for inputs in ((NEAR, FAR), Views(NEAR, FAR), {"far": FAR, "near": NEAR}):
        torch.manual_seed(0)
        network = TwoInputs()
        trainer_of(network, method).step(inputs, targets, losses)
        ends.append(torch.cat([weight.flatten() for weight in weights(network)]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (lambda outputs, targets: losses(outputs, targets).mean(), r"\[\]"),
        (lambda outputs, targets: losses(outputs, targets)[:5], r"\[5\]"),
        (lambda outputs, targets: losses(outputs, targets).unsqueeze(1), r"\[6, 1\]"),
    ],
    ids=["mean", "too few", "column"],
)
@pytest.mark.parametrize("name", ["sgd", "sam", "esam", "recycled"])
def test_a_loss_that_is_not_one_number_per_sample_is_refused_in_one_line(name, loss_fn, shape):
    network = TwoInputs()
    before = weights(network)
    trainer = trainer_of(network, sharp(name) if name != "sgd" else sharp("sam", rho=0.0))
    with pytest.raises(UserError, match=rf"loss_fn returned a tensor of shape {shape} for 6 samples") as refused:
        trainer.step((NEAR, FAR), {"label": LABELS}, loss_fn)
    assert 'reduction="none"' in str(refused.value)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(*both) for both in zip(weights(network), before, strict=True))


def test_a_loss_that_is_no_tensor_is_refused_in_one_line():
    with pytest.raises(UserError, match="loss_fn returned float for 6 samples") as refused:
        trainer_of(TwoInputs(), sharp()).step((NEAR, FAR), {"label": LABELS}, lambda outputs, targets: 0.5)
    assert "\n" not in str(refused.value)
