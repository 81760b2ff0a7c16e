"""The first hour: a config for one's own data that trains, recipes, networks, completion."""

import dataclasses
import shutil
import subprocess

import pytest

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.guide import completion, init, models, proposal, survey
from esam_dist.guide.survey import Device, Images
from tests.commands import ROOT, here, rows
from tests.prepared import class_folders
from tests.prepared import run as prepare

CPU = Device(0, 0, False, 2)
GPUS = Device(8, 80 * 2**30, True, 64)


def images(tmp_path, **changes):
    return dataclasses.replace(Images(tmp_path, 600, 200, 10, 160), **changes)


def proposed(images, device, name=None):
    size = proposal.image_size(images, device)
    network = survey.look_at_network(name or proposal.model(images, device), images.classes, size)
    return network, proposal.propose(images, device, network)


@pytest.mark.parametrize("device", [CPU, GPUS])
@pytest.mark.parametrize("side", [8, 32, 64, 160, 500])
@pytest.mark.parametrize("train", [60, 600, 50_000, 1_281_167])
def test_a_proposal_fits_the_images_and_the_device(tmp_path, device, side, train):
    network, chosen = proposed(images(tmp_path, train=train, short_side=side), device)
    batch = chosen.batch_size * device.ranks
    assert batch <= max(device.ranks, train / proposal.LEAST_UPDATES)
    assert network.image_size <= max(side, 64)
    # The trap: a rate for 64 images of digits, given to 16 photographs.
    assert chosen.lr <= 0.1 * batch / 256 * 1.05  # two digits
    assert chosen.augment == ("shift" if side <= 40 else "imagenet")


def test_a_network_of_one_size_gets_it_and_one_without_batchnorm_gets_adamw(tmp_path):
    network, chosen = proposed(images(tmp_path), CPU, "vit_b_16")
    assert network.image_size == 224
    assert (chosen.optimizer, chosen.lr) == ("adamw", 0.00013)


def test_a_batch_is_no_larger_than_the_memory(tmp_path):
    many = images(tmp_path, train=10**6)
    network = survey.look_at_network("resnet50", 10, 224)
    small, large = (proposal.batch_size(many, Device(1, size * 2**30, True, 8), network) for size in (8, 80))
    assert small < large <= proposal.MOST_PER_GPU
    assert small * network.activations < 8 * 2**30


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Small pictures of three classes, prepared."""
    root = tmp_path_factory.mktemp("photos")
    prepare("folder", root / "data", "--from", class_folders(root / "ours", size=(64, 48)), "--workers", 0)
    return root / "data"


def test_init_writes_a_config_that_says_why_and_trains_as_it_is(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = here("init", photos, "--model", "cifar_resnet8")
    assert answer.status == 0, answer.err
    assert "esam-dist launch data.yaml" in answer.out
    cfg = config.load(tmp_path / "data.yaml")
    assert (cfg.data.path, cfg.method.name, cfg.model.name) == (photos, "esam", "cifar_resnet8")
    for section in ("model", "data", "train", "optim", "method"):
        assert f"\n{section}:\n" in (tmp_path / "data.yaml").read_text()
    trained = here("train", "data.yaml", "train.epochs=4", "data.workers=0", "data.image_size=32", "train.log_every=1")
    assert trained.status == 0, trained.err
    losses = [row["loss"] for row in rows(tmp_path / "runs/data")]
    assert sum(losses[-4:]) / 4 < 0.9 * losses[0]
    # What is there is not written over.
    again = here("init", photos)
    assert again.status == 2
    assert "data.yaml: is there already" in again.err


@pytest.mark.parametrize("method", ["sgd", "msam", "recycled"])
def test_init_takes_every_kind_of_method(tmp_path, method):
    of = images(tmp_path)
    network, _ = proposed(of, CPU)
    path = tmp_path / "my.yaml"
    path.write_text(init.written(path, of, GPUS, network, method))
    assert config.load(path).method.name == method


def test_init_of_what_is_no_data_or_no_network_is_one_line(photos, tmp_path):
    assert "esam-dist prepare" in here("init", tmp_path / "nowhere").err
    wrong = here("init", photos, "--model", "resnet_50", "--output", tmp_path / "a.yaml")
    assert (wrong.status, wrong.err.count("\n")) == (2, 1)
    assert "resnet50" in wrong.err


def test_recipes_lists_every_config_and_prints_one():
    answer = here("recipes")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"{path.stem} " in answer.out
        assert here("recipes", path.stem).out == path.read_text()
    assert "wrn28_10" in answer.out
    assert "pyramidnet110" in answer.out


def test_a_recipe_that_there_is_not_names_the_nearest():
    answer = here("recipes", "photograph")
    assert answer.status == 2
    assert "photographs" in answer.err


def test_models_lists_ours_and_torchvisions_with_parameters():
    answer = here("models", "resnet*")
    assert "resnet50" in answer.out
    assert "25.56 M" in answer.out
    names = here("models").out
    for name in ("cifar_resnet8", "wrn28_10", "pyramidnet110", "vit_s_16", "vit_b_16"):
        assert f"{name} " in names
    assert models.matching("wrn") == ["wrn16_4", "wrn28_10"]
    assert here("models", "nothing*").status == 2


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_is_a_script_that_its_shell_can_read(shell, tmp_path):
    answer = here("completion", shell)
    assert answer.status == 0
    assert "doctor" in answer.out
    if shutil.which(shell):
        (tmp_path / "script").write_text(answer.out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


def test_bash_completes_commands(tmp_path):
    (tmp_path / "script").write_text(here("completion", "bash").out)
    program = f"source {tmp_path}/script; COMP_WORDS=(esam-dist do); COMP_CWORD=1; $(complete -p esam-dist | sed -E "
    program += "'s/.*-F ([^ ]+).*/\\1/') esam-dist do esam-dist; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["doctor"], done.stderr


def test_check_says_when_the_data_was_not_looked_at_and_refuses_damaged_data(tiny, few_digits, tmp_path):
    assert here("config", tiny, "--check").out == "valid\n"
    told = here("config", tiny, "--check", f"data.path={tmp_path / 'nowhere'}")
    assert told.status == 0
    assert "nowhere is not there, so the data was not looked at" in told.out
    assert here("config", tiny, "--check", "model.name=resnet_50").status == 2
    damaged = shutil.copytree(few_digits, tmp_path / "data")
    next((damaged / "train").glob("*.tar")).write_bytes(b"")
    answer = here("config", tiny, "--check", f"data.path={damaged}")
    assert (answer.status, answer.out) == (2, "")


def test_no_image_that_can_be_read_is_refused(few_digits, monkeypatch):
    def unreadable(_data):
        raise survey.SampleError("undecodable")

    monkeypatch.setattr(survey, "ImageFile", unreadable)
    with pytest.raises(UserError, match="prepare verify"):
        survey.look_at_images(few_digits)
