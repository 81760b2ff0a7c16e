"""Images that a network does not take: one line with the size to set, before the first step."""

import pytest
import torch

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.models import build_model, model_names
from esam_dist.models.sizes import refuse_size
from esam_dist.network import build_network, prepare_training
from esam_dist.ranks import Ranks


def refused(name, size, **sections):
    cfg = config.parse({"model": {"name": name}, "data": {"image_size": size}} | sections, "test")
    with pytest.raises(UserError) as caught:
        build_network(cfg, 10, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "remedy"),
    [
        ("vit_s_16", 32, "set data.image_size = 224, or model.options = {image_size: 32}"),
        pytest.param("inception_v3", 32, "set data.image_size = 299", marks=pytest.mark.slow),
        ("timm/vit_tiny_patch16_224", 32, "set data.image_size = 224"),
        pytest.param("maxvit_t", 32, "set data.image_size = 224", marks=pytest.mark.slow),
        pytest.param("vit_b_16", 65, "set data.image_size = 224", marks=pytest.mark.slow),
        pytest.param("alexnet", 32, "set data.image_size = 224", marks=pytest.mark.slow),
        pytest.param("densenet121", 16, "set data.image_size = 224", marks=pytest.mark.slow),
    ],
)
def test_a_size_that_the_network_does_not_take_names_one_that_it_does(name, size, remedy):
    message = refused(name, size)
    assert message.endswith(remedy)
    assert f"data.image_size = {size}: model.name = {name} takes no images of {size} pixels" in message


def test_a_size_of_progressive_training_likewise():
    message = refused("vit_s_16", 224, data={"image_size": 224, "progressive": [[0, 160]]})
    assert "data.progressive = 160" in message


def test_a_table_of_positions_for_another_size_is_built_when_asked_for():
    cfg = {"model": {"name": "vit_s_16", "options": {"image_size": 32}}, "data": {"image_size": 32}}
    network = build_network(config.parse(cfg, "test"), 10, torch.device("cpu"))
    assert network.network.encoder.pos_embedding.shape == (1, 5, 384)


def test_a_batch_of_one_where_batchnorm_needs_two():
    cfg = config.parse({"model": {"name": "cifar_resnet8"}, "data": {"batch_size": 1}, "method": {"gamma": 1}}, "test")
    prepare_training(cfg, build_network(cfg, 10, torch.device("cpu")), Ranks())
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"name": "shufflenet_v2_x0_5"})})
    network = build_network(cfg, 10, torch.device("cpu"))
    with pytest.raises(UserError, match=r"data.batch_size = 1 .*set 2 or more"):
        prepare_training(cfg, network, Ranks())


def test_the_look_leaves_network_and_random_state_as_they_were():
    torch.manual_seed(3)
    network = build_model("mobilenet_v3_small", 10)
    before, state = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    refuse_size("mobilenet_v3_small", network, 32, 2, "data.image_size")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.device.type == "cpu" for value in network.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model_names() if not name.startswith("vit_h")])
def test_every_network_takes_the_size_that_is_advised(name):
    network = build_model(name, 10)
    for size in (1, 7, 33, 224):
        try:
            refuse_size(name, network, size, 2, "data.image_size")
        except UserError as error:
            advised = int(str(error).partition("set data.image_size = ")[2].partition(",")[0])
            with torch.no_grad():
                assert network(torch.zeros(2, 3, advised, advised)).shape == (2, 10)
