"""What a user can get wrong in exporting and predicting is one line with a remedy; and what is close to it works."""

import json

import pytest
import torch

from esam_dist.checkpoint import Checkpoints
from esam_dist.models import build_model
from tests.commands import here
from tests.prepared import picture

CARD = {
    "model": "cifar_resnet8",
    "num_outputs": 4,
    "classes": ["ant", "bee", "c\u00e4t"],
    "image_size": 16,
    "crop_ratio": 1.0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def save(folder, **state):
    """A checkpoint of step 1 in the run's folder; nothing else is there."""
    torch.manual_seed(0)
    weights = {f"network.{name}": value for name, value in build_model("cifar_resnet8", 4).state_dict().items()}
    whole = {"engine": {"model": weights, "optimizer": {}}, "train": {"step": 1, "samples_seen": 8}, "card": CARD}
    folder.mkdir(exist_ok=True)
    Checkpoints(folder / "checkpoints", keep=9).save(whole | state, 1, accuracy=0.5)
    return folder


@pytest.fixture
def run(tmp_path):
    return save(tmp_path / "run")


@pytest.fixture
def image(tmp_path):
    picture(1, 2).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def exported(run):
    assert here("export", run).status == 0
    return run / "export/model.safetensors"


def refused(*words):
    answer = here(*words)
    assert (answer.status, answer.out, answer.err.count("\n")) == (2, "", 1), answer
    return answer.err


def change(file, **values):
    path = file.with_name(f"{file.name}.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


def test_an_output_that_the_data_had_no_class_for_is_called_by_its_number(run, image):
    answer = here("predict", run, image, "--top", 4, "--format", "jsonl", "--workers", 0)
    (row,) = map(json.loads, answer.out.splitlines())
    named = {guess["output"]: guess["class"] for guess in row["predictions"]}
    assert named == {0: "ant", 1: "bee", 2: "c\u00e4t", 3: "3"}


def test_the_sidecar_may_be_given_for_its_file_and_a_step_for_its_checkpoint(exported, run, image):
    state = run / "checkpoints/step_00000001/state.pt"
    models = (exported, f"{exported}.json", run / "1", run / "step_1", state)
    told = [here("predict", model, image, "--workers", 0).out for model in models]
    assert len(set(told)) == 1
    assert told[0].count("\n") == 2


def test_a_file_without_its_sidecar(exported, image):
    exported.with_name(f"{exported.name}.json").unlink()
    assert "keep the two files of `esam-dist export` together" in refused("predict", exported, image)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": "large"}, "model.safetensors.json is damaged (image_size: "),
        ({"std": [0.0, 1.0, 1.0]}, "is damaged (std.0: "),
        ({"sha256": "0" * 64}, "is not the file that its sidecar describes; export again"),
        ({"model": "cifar_resnet20"}, "its weights are not those of cifar_resnet20 (Missing key(s)"),
        ({"model": "cifar_resnet"}, "did you mean cifar_resnet"),
        ({"num_outputs": 9}, "its weights are not those of cifar_resnet8 (size mismatch"),
        ({"format": "torchscript"}, "may hold code; give one of safetensors, state_dict, onnx, or the run"),
    ],
)
def test_a_sidecar_that_does_not_fit_its_file(exported, image, values, words):
    change(exported, **values)
    assert words in refused("predict", exported, image)


def test_a_damaged_file(exported, image):
    exported.write_bytes(exported.read_bytes()[:-1])
    assert "is not the file that its sidecar describes" in refused("predict", exported, image)


def test_an_exported_file_has_no_checkpoints(exported, image):
    assert "leave --checkpoint and --averaged out" in refused("predict", exported, image, "--averaged")
    assert "is a file, and a checkpoint is a folder" in refused("export", exported)


def test_a_checkpoint_that_is_already_named(run):
    assert "give only one of the two" in refused("export", run / "checkpoints/step_00000001", "--checkpoint", "newest")


def test_a_card_that_is_damaged(tmp_path):
    run = save(tmp_path / "run", card=CARD | {"mean": [1.0]})
    assert "step_00000001: its card is damaged (mean: " in refused("export", run)


def test_a_checkpoint_of_an_earlier_version_without_its_run(tmp_path):
    run = save(tmp_path / "run", card=None)
    assert "put it back into the checkpoints/ of its run" in refused("export", run)


def test_an_average_that_was_not_kept(run):
    assert "holds no average" in refused("export", run, "--averaged")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output", "m.onnx", "--format", "safetensors"), "ends in .safetensors"),
        (("--output", "m.pt"), "say with --format whether it is to be state_dict or torchscript"),
    ],
)
def test_an_output_that_is_called_like_another_format(run, options, words):
    assert words in refused("export", run, *options)


@pytest.mark.parametrize(("name", "format_"), [("m.pth", "state_dict"), ("m", "safetensors"), ("m.pt", "state_dict")])
def test_an_outputs_name_says_its_format_unless_an_option_does(run, tmp_path, name, format_):
    options = ("--format", "state_dict") if name == "m.pt" else ()
    assert here("export", run, "--output", tmp_path / name, *options).status == 0
    assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["format"] == format_


def test_an_output_that_cannot_be_written(run, image, tmp_path):
    assert "--output" in refused("export", run, "--output", image / "m.safetensors")
    answer = here("predict", run, image, "--workers", 0, "--output", image / "p.csv")
    assert answer.status == 2
    assert f"--output {image / 'p.csv'}: cannot be written" in answer.err
    assert "is a folder" in refused("predict", run, image, "--output", tmp_path)


def test_workers_that_have_no_room_are_called_by_the_option(run, image, monkeypatch):
    def full(length):
        raise RuntimeError("unable to allocate shared memory: no space")

    monkeypatch.setattr("torch.UntypedStorage._new_shared", full)
    assert "--workers 1: they need" in refused("predict", run, image, "--workers", 1)


@pytest.mark.parametrize("option", [("--top", "0"), ("--batch-size", "0"), ("--workers", "-1")])
def test_numbers_out_of_range(run, image, option):
    assert " ".join([*option, "is out of range"]) in refused("predict", run, image, *option)


@pytest.mark.parametrize("command", ["export", "predict"])
def test_several_ranks_would_do_the_same_work(run, image, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    paths = [image] if command == "predict" else []
    assert "start it without torchrun" in refused(command, run, *paths)
