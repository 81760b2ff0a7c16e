"""From weights to a fine-tuned network by the command line."""

from __future__ import annotations

import logging

import pytest
import torch

from esam_dist.models import build_model
from tests.commands import here, on_ranks, rows
from tests.end_to_end.test_bad_input import assert_refused


@pytest.fixture
def weights(tmp_path):
    """Of another task with five classes, as plain torch saves them."""
    torch.manual_seed(5)
    network = build_model("cifar_resnet8", 5)
    with torch.no_grad():
        for value in network.buffers():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def state_of(folder, step):
    return torch.load(folder / f"checkpoints/step_{step:08d}/state.pt", weights_only=True)


def network_of(folder, step):
    model = state_of(folder, step)["engine"]["model"]
    return {name.removeprefix("network."): value for name, value in model.items()}


def test_a_classifier_alone_is_trained_on_weights_that_stay(tiny, tmp_path, weights, caplog):
    caplog.set_level(logging.INFO)
    words = ("model.freeze=all_but_head", "train.epochs=1", "method.name=sam")
    assert here("train", tiny, f"run.folder={tmp_path / 'run'}", f"model.weights={weights}", *words).status == 0
    plain = torch.load(weights, weights_only=True)
    for name, value in network_of(tmp_path / "run", 10).items():
        if not name.startswith("head."):
            assert torch.equal(value, plain[name]), name
    (line,) = [line for line in caplog.messages if line.startswith("model.weights")]
    assert "left: head.weight [5, 64], head.bias [5]; missing, and made anew: head.weight [10, 64], head.bias" in line
    assert rows(tmp_path / "run")[0]["lr"] > 0.0


def test_a_run_goes_on_to_the_bit_and_without_the_weights(tiny, tmp_path, weights):
    words = (f"model.weights={weights}", "model.freeze=[stem.*]", "optim.layer_decay=0.8", "optim.head_lr_factor=2")
    words += ("train.epochs=2", "optim.name=adamw", "optim.lr=0.01")
    for folder, stops in (("whole", [()]), ("halves", [("train.max_steps=5",), ()])):
        for number, stop in enumerate(stops):
            if number == 1:
                weights.unlink()
            assert here("train", tiny, f"run.folder={tmp_path / folder}", *words, *stop).status == 0
    whole, halves = (state_of(tmp_path / name, 20)["engine"] for name in ("whole", "halves"))
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name
    for name, entry in whole["optimizer"].items():
        assert all(torch.equal(value, halves["optimizer"][name][key]) for key, value in entry.items()), name
    assert "network.stem.0.weight" not in whole["optimizer"]


def test_weights_of_a_run_begin_another_and_do_not_matter_when_it_goes_on(tiny, tmp_path):
    assert here("train", tiny, f"run.folder={tmp_path / 'first'}", "train.max_steps=3").status == 0
    words = (f"run.folder={tmp_path / 'second'}", f"model.weights={tmp_path / 'first'}", "optim.lr=0")
    assert here("train", tiny, *words, "train.max_steps=1", "model.freeze=all_but_head").status == 0
    first, second = network_of(tmp_path / "first", 3), network_of(tmp_path / "second", 1)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_only_rank_0_reads_the_weights_and_all_ranks_have_them(tiny, tmp_path, weights, engine):
    words = (f"model.weights={weights}", "method.name=sgd", "train.max_steps=1", "model.freeze=all_but_head")
    assert here("train", tiny, f"run.folder={tmp_path / 'one'}", *words, "data.batch_size=16").status == 0
    for answer in on_ranks("train", tiny, f"run.folder={tmp_path / 'two'}", *words, f"engine.name={engine}"):
        assert answer.status == 0, answer.err
    # Statistics that stay make of two ranks' batches what one has of both.
    one, two = (rows(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    plain = torch.load(weights, weights_only=True)
    assert torch.equal(network_of(tmp_path / "two", 1)["stem.1.running_var"], plain["stem.1.running_var"])


def test_a_checkpoint_of_a_run_in_which_other_weights_were_frozen(tiny, tmp_path):
    words = ("method.name=looksam", "method.interval=2", "train.max_steps=2")
    assert here("train", tiny, f"run.folder={tmp_path / 'first'}", *words).status == 0
    resume = (f"run.folder={tmp_path / 'second'}", f"run.resume={tmp_path / 'first'}", "model.freeze=[stem.*]")
    assert_refused(here("train", tiny, *words, *resume), "model.freeze", "model.weights = ")
    # Without such a memory it goes on.
    words = ("method.name=sam", "train.max_steps=2")
    assert here("train", tiny, f"run.folder={tmp_path / 'third'}", *words).status == 0
    resume = (f"run.folder={tmp_path / 'fourth'}", f"run.resume={tmp_path / 'third'}", "model.freeze=[stem.*]")
    assert here("train", tiny, "method.name=sam", "train.max_steps=3", *resume).status == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.weights=nowhere.pth", ["model.weights = nowhere.pth", "No such file", "give a file"]),
        ("model.weights=default", ["model.weights = default", "cifar_resnet8", "give a file"]),
        ("model.pretrained=true", ["model.pretrained", "model.weights"]),
        ("model.freeze=head_only", ["model.freeze = 'head_only'", "all_but_head"]),
        ("model.freeze=[layer9.*]", ["model.freeze", "'layer9.*' fits no parameter"]),
        ("optim.overrides=[{match: nothing}]", ["optim.overrides", "'nothing' fits no parameter"]),
        ("optim.overrides=[{lr_factor: 2}]", ["optim.overrides", "match"]),
        ("optim.layer_decay=0", ["optim.layer_decay = 0"]),
        ("model.options={dropout: 0.1}", ["model.options", "cifar_resnet8 takes no 'dropout'"]),
        ("model.name=timm/rsenet18", ["model.name = 'timm/rsenet18'", "timm/resnet18"]),
        ("model.name=vit_s_16", ["data.image_size = 16", "vit_s_16", "set data.image_size = 224"]),
        ("model.name=resnet18 data.batch_size=1", ["data.batch_size = 1", "resnet18", "set 2 or more"]),
    ],
)
def test_what_is_refused_is_one_line(tiny, tmp_path, override, words):
    changes = override.split(" ") if "{" not in override else [override]
    assert_refused(here("train", tiny, f"run.folder={tmp_path / 'run'}", *changes), *words)


def test_batchnorm_over_ranks_needs_gpus(tiny, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    words = (f"run.folder={tmp_path / 'run'}", "model.sync_batchnorm=true")
    assert_refused(here("train", tiny, *words), "model.sync_batchnorm", "GPUs")


def test_parts_of_recipes_go_together_and_the_rate_is_said(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recipe = ("train.loss=bce", "data.mixup=0.2", "optim.lr_per_256=0.64", "train.max_steps=2", "train.precision=fp16")
    losses = []
    for weights in ("none", "balanced"):
        words = (f"run.folder={tmp_path / weights}", f"train.class_weights={weights}", *recipe)
        assert here("train", tiny, *words).status == 0
        seen = rows(tmp_path / weights)
        losses.append(seen[0]["loss"])
        # 8 images an update, of which ten make the epoch of the warm-up
        assert [row["lr"] for row in seen] == pytest.approx([0.002, 0.004])
    assert "optim.lr_per_256 = 0.64 and 8 images per update: the peak learning rate is 0.02" in caplog.messages
    assert sum("train.precision = fp16: a CPU" in line for line in caplog.messages) == 2
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert losses == pytest.approx([0.69, 0.69], abs=0.3)
