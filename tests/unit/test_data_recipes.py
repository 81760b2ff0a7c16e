"""Recipes are valid, say how they are run, and name networks of the published sizes."""

from pathlib import Path

import pytest
import torch

from esam_dist import config
from esam_dist.models import build_model

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# Published, in millions: WRN-28-10 in arXiv 1605.07146, PyramidNet-110 in 1610.02915, ViT-S/16 in 2012.12877.
# Exact: what other implementations of the same networks count (pytorchcv, timm).
PARAMETERS = [
    ("wrn28_10", 10, 36_479_194, 36.5),
    ("pyramidnet110_a48", 10, 1_772_706, 1.7),
    ("pyramidnet110_a84", 10, 3_904_446, 3.8),
    ("pyramidnet110", 10, 28_485_477, 28.3),
    ("vit_s_16", 1000, 22_050_664, 22.1),
]


@pytest.mark.parametrize(("name", "num_classes", "exact", "millions"), PARAMETERS)
def test_networks_have_the_published_number_of_parameters(name, num_classes, exact, millions):
    with torch.device("meta"):
        model = build_model(name, num_classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == exact
    assert abs(count / 1e6 - millions) < 0.05 * millions


@pytest.mark.parametrize("name", ["wrn16_4", "pyramidnet110_a48"])
def test_networks_halve_the_image_twice_and_learn(name):
    torch.manual_seed(0)
    model = build_model(name, 10)
    shapes = []
    model.norm.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[2:])))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    assert shapes == [(8, 8)]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.01)
        assert torch.nn.functional.cross_entropy(model(images), labels) < loss


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_say_how_they_are_run(path):
    cfg = config.load(path)
    with torch.device("meta"):
        build_model(cfg.model.name, 10)
    opening = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"configs/{path.name}" in opening
    assert "measured" in opening or "from the paper" in opening or path.stem.startswith("digits")
    assert str(cfg.run.folder) == f"runs/{path.stem}"
