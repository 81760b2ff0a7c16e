"""Weights of somewhere else: loaded as torchvision loads them, to the bit; and one line where they do not fit."""

import argparse
import hashlib
import logging
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from esam_dist import config, pretrained
from esam_dist.checkpoint import Checkpoints
from esam_dist.errors import UserError
from esam_dist.models import build_model
from esam_dist.models.published import fetch, published_options
from esam_dist.models.taken import take
from esam_dist.models.weights import bare, read_weights

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(7)
    network = torchvision.models.get_model(NAME, num_classes=10)
    with torch.no_grad():
        for value in network.buffers():
            value.copy_(torch.rand(value.shape) * 9)
    return network.state_dict()


def begun(weights, num_classes=10, name=NAME):
    torch.manual_seed(0)
    network = build_model(name, num_classes)
    pretrained.begin(config.parse({"model": {"name": name, "weights": str(weights)}}, "test"), network)
    return network


def assert_equal(network, state, but=()):
    """As `load_state_dict` would have loaded `state`, to the bit, into a network that we did not build."""
    plain = torchvision.models.get_model(NAME, num_classes=10)
    plain.load_state_dict(state)
    for name, value in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], value) == (name not in but), name


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        begun(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.weights = ")
    return message


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: prefixed(state, "module._orig_mod."),
        lambda state: prefixed(state, "network."),
        lambda state: {name.replace("stage3.", "stage3._orig_mod."): value for name, value in state.items()},
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": prefixed(state, "model."), "arch": NAME},
        lambda state: {"n_averaged": torch.tensor(5), **prefixed(state, "module.")},
    ],
    ids=["plain", "ddp", "compiled", "both", "ours", "blocks", "torchvision's script", "lightning", "averaged"],
)
def test_what_wrappers_and_scripts_add_is_taken_off(theirs, tmp_path, wrapped):
    torch.save(wrapped(theirs), tmp_path / "weights.pth")
    found = read_weights(tmp_path / "weights.pth", "model.weights")
    assert list(found) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in found.items())


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_state_dict_is_loaded_as_torchvision_loads_it(theirs, tmp_path, kind):
    (torch.save if kind == "pth" else save_file)(theirs, tmp_path / f"weights.{kind}")
    assert_equal(begun(tmp_path / f"weights.{kind}"), theirs)


@pytest.fixture
def run(theirs, tmp_path):
    """A run of two checkpoints, of which the first is the better one."""
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep=9)
    for step, accuracy in ((1, 0.9), (2, 0.1)):
        model = prefixed({name: value * step for name, value in theirs.items()}, "network.")
        engine = {"model": model, "optimizer": {}}
        checkpoints.save({"engine": engine, "train": {"step": step, "samples_seen": 8}}, step, accuracy)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("place", "step"), [("", 1), ("checkpoints/step_00000002", 2), ("step_00000002", 2)], ids=["run", "folder", "name"]
)
def test_a_checkpoint_of_ours_or_the_best_of_a_run(run, theirs, place, step):
    assert_equal(begun(run / place), {name: value * step for name, value in theirs.items()})


def test_a_classifier_of_other_classes_is_made_anew_and_said_in_one_line(theirs, tmp_path, caplog):
    torch.save(theirs, tmp_path / "weights.pth")
    caplog.set_level(logging.INFO)
    network = begun(tmp_path / "weights.pth", num_classes=3)
    torch.manual_seed(0)
    fresh = build_model(NAME, 3).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("fc.") else theirs[name]), name
    (line,) = caplog.messages
    num = len(theirs)
    assert f"{num - 2} of {num} tensors taken; left: fc.weight [10, 1024], fc.bias [10]; missing, and" in line
    assert line.endswith("made anew: fc.weight [3, 1024], fc.bias [3]")


def test_a_backbone_without_a_classifier_is_taken(theirs, tmp_path):
    torch.save({name: value for name, value in theirs.items() if not name.startswith("fc.")}, tmp_path / "weights.pth")
    assert_equal(begun(tmp_path / "weights.pth"), theirs, but=("fc.weight", "fc.bias"))


def shapes(name):
    """Weights of the shapes of `name`, without memory."""
    with torch.device("meta"):
        state = build_model(name, 1000).state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("resnet50", ["layer1.0.conv1.weight", "[64, 64, 1, 1] there", "[64, 64, 3, 3] here"]),
        ("resnet34", ["layer1.2.conv1.weight", "[64, 64, 3, 3]", "is not in it"]),
        ("vgg11", ["conv1.weight", "[64, 3, 7, 7] here", "missing there"]),
    ],
)
def test_weights_of_another_network_are_refused_by_the_first_key_and_its_shapes(weights, words):
    network = build_model("resnet18", 10)
    with pytest.raises(UserError) as caught:
        take(network, shapes(weights), "model.weights = X", "resnet18")
    assert "\n" not in str(caught.value)
    for word in ["model.weights = X", "model.name = resnet18", *words]:
        assert word in str(caught.value), caught.value


def test_names_that_newer_versions_have_changed_are_known():
    torch.manual_seed(0)
    vit = build_model("vit_s_16", 2)
    before = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    old = {
        re.sub(r"mlp\.[03]\.", lambda found: before[found[0]], name): value + 1
        for name, value in vit.state_dict().items()
    }
    assert old.keys() != vit.state_dict().keys()
    again = build_model("vit_s_16", 2)
    assert take(again, old, "X", "vit_s_16").left == {}
    assert all(torch.equal(again.state_dict()[name], value + 1) for name, value in vit.state_dict().items())
    named = {"features.denseblock1.denselayer1.norm.1.weight": torch.ones(1)}
    assert list(bare(named, "X")) == ["features.denseblock1.denselayer1.norm1.weight"]


class Anything:
    pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Anything(), ["Python objects", "state_dict"]),
        ({"epoch": 3}, ["no table of weights"]),
        ([torch.ones(1)], ["no table of weights"]),
        (b"no weights", ["holds no weights that could be read"]),
        (None, ["No such file"]),
    ],
    ids=["object", "no table", "list", "bytes", "missing"],
)
def test_a_file_that_holds_none_is_one_line(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = refused(path)
    assert all(word in message for word in [str(path), *words]), message


def test_broken_safetensors_a_folder_of_nothing_and_numbers_that_are_none(theirs, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"{}" * 20)
    assert "no weights that could be read" in refused(tmp_path / "weights.safetensors")
    (tmp_path / "folder").mkdir()
    assert "no run and no checkpoint" in refused(tmp_path / "folder")
    torch.save(theirs | {"fc.bias": torch.full((10,), torch.nan)}, tmp_path / "weights.pth")
    assert "fc.bias is not finite" in refused(tmp_path / "weights.pth")


def test_published_weights_come_from_the_cache(theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(theirs, tmp_path / "hub/checkpoints" / url.rpartition("/")[2])
    for wanted in ("default", "IMAGENET1K_V1"):
        assert_equal(begun(wanted), theirs)
    assert "IMAGENET1K_V1" in refused("IMAGENET1K_V7")
    assert "nobody has published" in refused("default", name="cifar_resnet8")
    # torchvision builds them with it, for these weights.
    assert published_options("inception_v3", "default") == {"transform_input": True}
    assert published_options("inception_v3", "weights.pth") == published_options("resnet18", "default") == {}


def test_without_a_network_the_line_names_the_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    message = refused("default")
    assert all(word in message for word in (url, str(tmp_path / "hub/checkpoints"), "unreachable")), message


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if "weights" in self.path else 404)
        self.end_headers()
        self.wfile.write(b"weights")

    def log_message(self, *_):
        pass


def test_what_is_not_there_is_fetched_whole_or_not_at_all(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    try:
        path = tmp_path / "new/weights-00000000.pth"
        with pytest.raises(UserError, match="invalid hash"):
            fetch(f"{at}/{path.name}", path, "default")
        assert not path.exists()
        with pytest.raises(UserError, match="404"):
            fetch(f"{at}/nothing", path, "default")
        right = path.with_name(f"weights-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth")
        fetch(f"{at}/{right.name}", right, "default")
        assert right.read_bytes() == b"weights"
    finally:
        server.shutdown()
        server.server_close()
