"""Networks by name, against the parameter counts that their papers and torchvision publish."""

import pytest
import torch
import torchvision

from esam_dist.errors import UserError
from esam_dist.models import Classifier, build_model, model_names


def count(model):
    return sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        # Counted by hand, layer by layer: 3x3 stem, then per stage n blocks, 1x1 projections where the shape changes.
        ("cifar_resnet8", 78_042),
        # He et al. 2016, table 6: 0.27 M; 1x1 projections add 2,752 to the paper's padded shortcuts (269,722).
        ("cifar_resnet20", 272_474),
        # The network of kuangliu/pytorch-cifar that SAM's and ESAM's CIFAR runs use.
        ("cifar_resnet18", 11_173_962),
    ],
)
def test_parameters_of_our_networks(name, num_params):
    assert count(build_model(name, 10)) == num_params


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
        ("resnet50", torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
        ("resnet101", torchvision.models.ResNet101_Weights.IMAGENET1K_V1),
        ("mobilenet_v3_small", torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1),
        ("vit_b_32", torchvision.models.ViT_B_32_Weights.IMAGENET1K_V1),
    ],
)
def test_parameters_of_torchvisions_networks_as_published(name, weights):
    with torch.device("meta"):
        model = build_model(name, 1000)
    assert count(model) == weights.meta["num_params"]


# One of each family that can be built without memory; googlenet and inception_v3 have auxiliary outputs to drop.
FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5"),
    *("mobilenet_v2", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11", "vit_b_32"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_networks_give_one_logit_per_class_in_training(name):
    with torch.device("meta"):
        assert _logits(name).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model_names() if not name.startswith("cifar")])
def test_every_torchvision_classifier_gives_one_logit_per_class_in_training(name):
    with torch.no_grad():
        assert _logits(name).shape == (2, 7)


def _logits(name):
    size = 299 if name == "inception_v3" else 224
    return build_model(name, 7)(torch.zeros(2, 3, size, size))


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_resnet18", "cifar_resnet20"])
@pytest.mark.parametrize("size", [16, 32])
def test_our_networks_give_one_logit_per_class(name, size):
    assert build_model(name, 7)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_the_same_seed_builds_the_same_weights():
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(build_model("cifar_resnet8", 10).head.weight)
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet_50", "resnet50"), ("cifar_resnet9", "cifar_resnet8"), ("vitb16", "vit_b_16")]
)
def test_wrong_name_names_the_nearest(name, nearest):
    with pytest.raises(UserError, match="did you mean") as error:
        build_model(name, 10)
    assert nearest in str(error.value)


def test_a_name_like_no_other_still_names_one():
    with pytest.raises(UserError, match="resnet50"):
        build_model("qqqqqqqq", 10)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_and_weights_are_float32_whatever_the_precision(precision):
    model = Classifier(build_model("cifar_resnet8", 10), precision)
    assert model(torch.zeros(2, 3, 16, 16)).dtype == torch.float32
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_bf16_computes_in_bfloat16():
    seen = []
    model = Classifier(build_model("cifar_resnet8", 10), "bf16")
    model.network.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model(torch.zeros(2, 3, 16, 16))
    assert seen == [torch.bfloat16]
