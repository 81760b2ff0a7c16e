"""Rates and weight decay by parameter: against lists made by hand, and against timm's."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from esam_dist.engine.build import build_optimizer
from esam_dist.engine.groups import is_decayed, param_groups, set_rate
from esam_dist.engine.keys import OptimKeys
from esam_dist.errors import UserError
from esam_dist.layers import depths, head
from esam_dist.models import Classifier, build_model, model_names
from esam_dist.models.freeze import freeze


def on_meta(name, num_classes=10):
    with torch.device("meta"):
        return build_model(name, num_classes)


def by_name(network, **optim):
    """Factor of the rate, and weight decay, of each trained parameter."""
    names = {param: name for name, param in network.named_parameters()}
    groups = param_groups(network, OptimKeys(weight_decay=0.1, **optim))
    found = [
        (names[param], (group["lr_factor"], group["weight_decay"])) for group in groups for param in group["params"]
    ]
    assert len(found) == len(dict(found))
    return dict(found)


def test_layers_of_a_resnet_by_hand():
    # conv1 and bn1; eight blocks, each with its downsampling; fc
    expected = {"conv1": 0, "bn1": 0, "fc": 9}
    expected |= {f"layer{1 + block // 2}.{block % 2}": 1 + block for block in range(8)}
    network = on_meta("resnet18")
    found = by_name(network, layer_decay=0.5)
    assert len(found) == len(list(network.parameters()))
    for name, (factor, _) in found.items():
        (layer,) = [number for part, number in expected.items() if name.startswith(f"{part}.")]
        assert factor == 0.5 ** (9 - layer), name


def test_layers_of_a_vision_transformer_by_hand():
    found = by_name(on_meta("vit_b_16"), layer_decay=0.5)
    # class token, patches and positions; twelve blocks, the last with the normalisation behind it; the head
    expected = {"class_token": 0, "conv_proj.": 0, "encoder.pos_embedding": 0, "encoder.ln.": 12, "heads.head.": 13}
    expected |= {f"encoder.layers.encoder_layer_{block}.": 1 + block for block in range(12)}
    for name, (factor, _) in found.items():
        (layer,) = [number for part, number in expected.items() if name.startswith(part)]
        assert factor == 0.5 ** (13 - layer), name


@pytest.mark.parametrize(
    "name",
    [
        *("vit_tiny_patch16_224", "resnet26"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext_atto", "deit3_small_patch16_224")),
    ],
)
def test_layers_and_decay_are_those_of_timm(name):
    network = timm.create_model(name, num_classes=10)
    names = {param: name for name, param in network.named_parameters()}
    spared = getattr(network, "no_weight_decay", tuple)()
    theirs = {
        names[param]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(network, weight_decay=0.1, layer_decay=0.75, no_weight_decay_list=spared)
        for param in group["params"]
    }
    ours = by_name(network, layer_decay=0.75)
    if name == "convnext_atto":
        # timm takes the blocks of a stage together in threes; the order is the same.
        ours = {key: (theirs[key][0], decay) for key, (_, decay) in ours.items()}
    assert ours == {key: (pytest.approx(factor), decay) for key, (factor, decay) in theirs.items()}


@pytest.mark.parametrize(
    ("name", "undecayed"),
    [
        ("convnext_tiny", ["features.1.0.layer_scale", "features.0.1.weight", "features.0.0.bias"]),
        ("swin_v2_t", ["features.1.0.attn.logit_scale", "norm.weight"]),
        ("swin_t", ["features.1.0.attn.relative_position_bias_table"]),
        ("vit_b_16", ["class_token", "encoder.pos_embedding", "encoder.ln.weight"]),
        ("maxvit_t", ["blocks.0.layers.0.layers.window_attention.attn_layer.1.relative_position_bias_table"]),
    ],
)
def test_weight_decay_is_for_kernels_and_matrices(name, undecayed):
    network = on_meta(name)
    params = dict(network.named_parameters())
    assert not any(is_decayed(key, params[key]) for key in undecayed)
    for key, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            assert is_decayed(f"{key}.weight", layer.weight), key
    found = by_name(network, decay_norm_and_bias=True)
    assert {decay for _, decay in found.values()} == {0.1}


def test_overrides_multiply_rates_and_replace_decays():
    overrides = [
        {"match": "layer4.*", "lr_factor": 2.0},
        {"match": "*.bn2.*", "lr_factor": 3.0, "weight_decay": 0.7},
        {"match": "layer4.1.bn2.bias", "weight_decay": 0.0},
    ]
    found = by_name(on_meta("resnet18"), head_lr_factor=10.0, layer_decay=0.5, overrides=overrides)
    assert found["fc.weight"] == (10.0, 0.1)
    assert found["layer4.1.conv1.weight"] == (0.5 * 2.0, 0.1)
    assert found["layer4.1.bn2.weight"] == (0.5 * 6.0, 0.7)
    assert found["layer4.1.bn2.bias"] == (0.5 * 6.0, 0.0)
    assert found["layer3.1.bn1.bias"] == (0.5**3, 0.0)


@pytest.mark.parametrize(
    ("match", "hint"), [("layer4", "'layer4' fits no .* layer4[.][*]"), ("fc.wieght", "fc.weight")]
)
def test_an_override_that_fits_nothing_names_what_would(match, hint):
    with pytest.raises(UserError, match=hint) as caught:
        by_name(on_meta("resnet18"), overrides=[{"match": match}])
    assert "optim.overrides" in str(caught.value)


def test_without_such_keys_the_groups_are_two_the_decayed_first():
    network = Classifier(build_model("cifar_resnet8", 10))
    optimizer = build_optimizer(network, OptimKeys())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    set_rate(optimizer, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_each_group_gets_its_share_of_the_rate_and_frozen_weights_none():
    network = Classifier(build_model("cifar_resnet8", 10))
    freeze(network, ["stem.*"])
    optimizer = build_optimizer(network, OptimKeys(head_lr_factor=10.0))
    set_rate(optimizer, 0.3)
    rates = {param: group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert rates[network.network.head.weight] == pytest.approx(3.0)
    assert rates[network.network.blocks[0].conv1.weight] == 0.3
    assert not rates.keys() & set(network.network.stem.parameters())


ONE_OF_EACH = ("alexnet", "densenet121", "efficientnet_b0", "mobilenet_v3_small", "squeezenet1_1", "vgg11", "wrn16_4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ONE_OF_EACH else pytest.mark.slow) for name in model_names()]
)
def test_the_head_is_what_the_number_of_classes_changes_and_the_deepest_layer(name):
    # A builder of regnet computes with tensors, and so cannot on the meta device.
    few, more = (build_model(name, num) if name.startswith("regnet") else on_meta(name, num) for num in (10, 11))
    shapes = {key: value.shape for key, value in few.state_dict().items()}
    changed = {key for key, value in more.state_dict().items() if shapes[key] != value.shape}
    assert {key.rpartition(".")[0] for key in changed} == {head(few)[0]}
    depth = depths(few)
    assert {key for key, value in depth.items() if value == max(depth.values())} == changed
    assert sorted(set(depth.values())) == list(range(max(depth.values()) + 1))
    assert max(depth.values()) >= 3
