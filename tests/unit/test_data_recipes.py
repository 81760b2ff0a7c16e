"""Recipes are there, valid, say how they are run and what is measured, and name networks of the published sizes."""

import re
from pathlib import Path

import pytest
import torch

from esam_dist import config
from esam_dist.models import build_model

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))

# Published, in millions: ResNet-18 in kuangliu/pytorch-cifar, WRN-28-10 in arXiv 1605.07146, PyramidNet-110 in
# 1610.02915, ViT-S/16 in 2012.12877.
# Exact: what other implementations of the same networks count (pytorchcv, timm).
PARAMETERS = [
    ("cifar_resnet18", 10, 11_173_962, 11.2),
    ("wrn28_10", 10, 36_479_194, 36.5),
    ("pyramidnet110_a48", 10, 1_772_706, 1.7),
    ("pyramidnet110_a84", 10, 3_904_446, 3.8),
    ("pyramidnet110", 10, 28_485_477, 28.3),
    ("vit_s_16", 1000, 22_050_664, 22.1),
    # The same networks with 100 classes instead of 10: 90 rows more of the last layer, and 90 biases.
    ("wrn28_10", 100, 36_479_194 + 90 * (640 + 1), 36.5),
    ("pyramidnet110", 100, 28_485_477 + 90 * (16 + 270 + 1), 28.3),
    ("cifar_resnet18", 100, 11_173_962 + 90 * (512 + 1), 11.2),
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


def opening(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_say_how_they_are_run(path):
    cfg = config.load(path)
    with torch.device("meta"):
        build_model(cfg.model.name, 10)
    assert re.search(rf"^#   (torchrun .* train|esam-dist launch) configs/{path.name}$", opening(path), re.M)
    assert str(cfg.run.folder) == f"runs/{path.stem}"


# What a line that begins so must say: a number that was measured or published, or that there is none.
LABELLED = {
    "# Result": r"# Result(, measured: .*\d.*|, from the paper: .*\d.*\(arXiv [\d.]+\).*|: not measured\b.*)",
    "# Time": r"# Time, measured\b.*: .*\d+ s\b.*",
    "# Machine": r"# Machine: .*\btime (and memory )?not measured\.",
}


def wrongly_labelled(text: str) -> list[str]:
    lines = text.splitlines()
    found = {start: [line for line in lines if line.startswith(start)] for start in LABELLED}
    wrong = [line for start, rule in LABELLED.items() for line in found[start] if not re.fullmatch(rule, line)]
    wrong += [f"{len(found['# Result'])} results"] if len(found["# Result"]) != 1 else []
    wrong += [] if found["# Time"] or found["# Machine"] else ["no time"]
    # What is said to be in a paper can be looked up there.
    return wrong + [line for line in lines if re.search(r"[Ff]rom the paper", line) and "arXiv" not in line]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_label_their_results_as_measured_or_from_the_paper_or_not_measured(path):
    assert wrongly_labelled(opening(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "# Result: accuracy 0.983.\n# Time, measured: 74 s",
        "# Result, measured: a good one.\n# Time, measured: 74 s",
        "# Result, from the paper: 94.2.\n# Time, measured: 74 s",
        "# Result: not measured.\n# Time: 74 s",
        "# Result: not measured.\n# Machine: 8 GPUs, an hour.",
        "# Result: not measured. From the paper: 0.983.\n# Time, measured: 74 s",
        "# Result: not measured.",
        "# Time, measured: 74 s",
        "",
    ],
)
def test_what_is_not_labelled_is_seen(text):
    assert wrongly_labelled(text)


# Recipe by recipe: data, network, optimizer, method.
GRID = {
    **{
        f"imagenet_{network}_{method}": ("imagenet", network, "sgd", method)
        for network in ("resnet50", "resnet101")
        for method in ("sgd", "sam", "esam")
    },
    "imagenet_vit_s_16_adamw": ("imagenet", "vit_s_16", "adamw", "sgd"),
    "imagenet_vit_s_16_sam": ("imagenet", "vit_s_16", "adamw", "sam"),
    "imagenet_vit_s_16_esam": ("imagenet", "vit_s_16", "adamw", "esam"),
    **{
        f"{data}_{name}_esam": (data, network, "sgd", "esam")
        for data in ("cifar10", "cifar100")
        for name, network in (
            ("resnet18", "cifar_resnet18"),
            ("wrn28_10", "wrn28_10"),
            ("pyramidnet110", "pyramidnet110"),
        )
    },
    "fashion_mnist_esam": ("fashion-mnist", "cifar_resnet8", "sgd", "esam"),
    **{f"digits_{method}": ("digits", "cifar_resnet8", "sgd", method) for method in ("sgd", "sam", "esam")},
}


@pytest.mark.parametrize("name", GRID)
def test_every_recipe_is_there_and_trains_what_its_name_says(name):
    cfg = config.load(CONFIGS / f"{name}.yaml")
    assert (cfg.data.path.name, cfg.model.name, cfg.optim.name, cfg.method.name) == GRID[name]


def test_there_are_no_other_recipes():
    assert {path.stem for path in RECIPES} == {*GRID, "photographs"}
