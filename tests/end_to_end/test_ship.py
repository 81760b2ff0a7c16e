"""From a trained run to plain torchvision, and to predictions of image files."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from esam_dist.checksum import sha256
from esam_dist.data import open_validation
from esam_dist.data.dataset import open_split
from esam_dist.data.keys import DataKeys
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.models import Classifier, build_model
from tests.commands import here
from tests.conftest import FewDigits

NETWORK = "shufflenet_v2_x0_5"
NAMES = ("z\u00e9ro", "\u4e00", "two", "three", "four, or 4", "five", "six", "seven", "eight", "nine")


class Named(FewDigits):
    """Few digits, with names that are not ASCII."""

    class_names = NAMES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "named"
    write_dataset(Named(), root, Plan(samples_per_shard=40))
    return root


@pytest.fixture(scope="module")
def run(tiny, data, tmp_path_factory):
    """A run of a torchvision network whose data and configuration are gone when it is used."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = (f"run.folder={folder}", f"data.path={data}", "data.image_size=32", "data.crop_ratio=0.875")
    answer = here("train", tiny, *words, f"model.name={NETWORK}", "train.epochs=1", "train.average=ema")
    assert answer.status == 0, answer.err
    return folder


@pytest.fixture(scope="module")
def pictures(data, tmp_path_factory):
    """The validation images as files, each in the folder of its class's number."""
    root, split = tmp_path_factory.mktemp("pictures"), open_split(data, "validation")
    for sample in range(split.num_samples):
        folder = root / str(split.label(sample))
        folder.mkdir(exist_ok=True)
        (folder / f"{sample}.png").write_bytes(split.read(sample))
    return root


def state_of(run):
    return torch.load(run / "checkpoints/step_00000010/state.pt", weights_only=True)


def exported(run, path, *options):
    answer = here("export", run, "--output", path, *options)
    assert answer.status == 0, answer.err
    return json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))


def by_hand(run, averaged):
    """Our network with a checkpoint's weights, taken apart here."""
    state = state_of(run)
    weights = state["engine"]["model"]
    if averaged:
        weights = weights | state["average"]["copies"][0] | state["average"]["statistics"]
    ours = Classifier(build_model(NETWORK, 10))
    ours.load_state_dict(weights)
    return ours.eval()


@pytest.mark.parametrize(("name", "read"), [("m.safetensors", load_file), ("m.pth", torch.load)])
@pytest.mark.parametrize("averaged", [False, True])
def test_plain_torchvision_takes_the_weights_and_gives_the_same_logits_to_the_bit(run, tmp_path, name, read, averaged):
    options = ["--averaged"] if averaged else []
    sidecar = exported(run, tmp_path / name, *options)
    plain = torchvision.models.get_model(NETWORK, weights=None, num_classes=10)
    plain.load_state_dict(read(tmp_path / name))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), by_hand(run, averaged)(images))
        assert not torch.equal(plain(images), by_hand(run, not averaged)(images))
    assert sidecar["averaged"] is averaged


def test_the_sidecar_says_what_is_needed_to_use_the_weights(run, data, tmp_path):
    path = tmp_path / "m.safetensors"
    sidecar = exported(run, path)
    assert sidecar["classes"] == list(NAMES)
    assert (sidecar["image_size"], sidecar["crop_ratio"]) == (32, 0.875)
    assert "Resize(37), CenterCrop(32)" in sidecar["preprocessing"]
    assert sidecar["mean"] == [0.485, 0.456, 0.406]
    network = eval(sidecar["build"], {"torchvision": torchvision})
    network.load_state_dict(load_file(path))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [row for row in rows if row["kind"] == "validation"][-1]
    assert (sidecar["step"], sidecar["accuracy"]) == (10, validated["accuracy"])
    assert exported(run, path, "--averaged")["accuracy"] == validated["averaged_accuracy"]
    assert sidecar["data"]["sha256"] == state_of(run)["card"]["data"]["sha256"]
    assert sidecar["versions"]["torch"] == torch.__version__


def test_the_checkpoint_alone_is_enough(run, pictures, tmp_path):
    alone = shutil.copytree(run / "checkpoints/step_00000010", tmp_path / "taken/step_00000010")
    assert exported(alone, tmp_path / "m.safetensors")["classes"] == list(NAMES)
    assert here("export", alone).status == 0
    assert (tmp_path / "taken/export/model.safetensors").is_file()
    assert predicted(alone, pictures) == predicted(run, pictures)


def predicted(model, *words):
    answer = here("predict", model, *words, "--workers", 0)
    assert answer.status == 0, answer.err
    return answer.out


@pytest.mark.parametrize("options", [(), ("--averaged",)])
def test_predictions_of_the_validation_images_have_the_accuracy_of_evaluate(run, pictures, options):
    found = [json.loads(line) for line in predicted(run, pictures, "--format", "jsonl", *options).splitlines()]
    assert len(found) == 23
    right = [row["predictions"][0]["output"] == int(row["path"].split("/")[-2]) for row in found]
    answer = here("evaluate", run, *options)
    assert f"accuracy {sum(right) / 23:.4f}" in answer.out
    assert 0 < sum(right) < 23
    for row in found:
        (best,) = row["predictions"]
        assert best["class"] == NAMES[best["output"]]


def test_each_file_has_the_probabilities_of_its_image(run, data, pictures):
    cfg = DataKeys(path=data, image_size=32, crop_ratio=0.875, batch_size=8, workers=0)
    # After ten updates BatchNorm's statistics fit the average only, for which they are computed anew.
    ours, shares = by_hand(run, averaged=True), []
    with torch.no_grad():
        for batch in open_validation(cfg, rank=0, world_size=1, device=torch.device("cpu")).batches():
            shares += ours(batch.images).softmax(1).tolist()
    answer = predicted(run, pictures, "--averaged", "--top", 10, "--format", "jsonl")
    found = [json.loads(line) for line in answer.splitlines()]
    for row in found:
        wanted = shares[int(row["path"].rpartition("/")[2].removesuffix(".png"))]
        for guess in row["predictions"]:
            # Six digits, and sums over batches of another size.
            assert guess["probability"] == pytest.approx(wanted[guess["output"]], abs=1e-5)
    assert len({row["predictions"][0]["probability"] for row in found}) > len(found) // 2 == 11


def test_csv_and_json_tell_the_same_and_probabilities_are_softmax(run, pictures, tmp_path):
    words = (pictures, "--top", 3)
    told = [json.loads(line) for line in predicted(run, *words, "--format", "jsonl").splitlines()]
    predicted(run, *words, "--output", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row["path"] for row in told] == sorted(row["path"] for row in told)
    for row, other in zip(rows, told, strict=True):
        for number, guess in enumerate(other["predictions"], 1):
            assert row[f"class_{number}"] == guess["class"]
            assert float(row[f"probability_{number}"]) == pytest.approx(guess["probability"], abs=1e-6)
    everything = json.loads(predicted(run, pictures / "3", "--top", 99, "--format", "jsonl").splitlines()[0])
    assert sum(guess["probability"] for guess in everything["predictions"]) == pytest.approx(1.0, abs=1e-5)
    assert len(everything["predictions"]) == 10


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_an_exported_file_predicts_what_the_run_does(run, pictures, tmp_path, name):
    exported(run, tmp_path / name)
    assert predicted(tmp_path / name, pictures, "--top", 2) == predicted(run, pictures, "--top", 2)


def test_broken_files_are_named_counted_and_passed_over(run, pictures, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / ".hidden.png").write_bytes(b"nor this")
    good = shutil.copy(next(pictures.rglob("*.png")), tmp_path / "good.png")
    answer = here("predict", run, tmp_path, "--workers", 0, "--batch-size", 1)
    assert answer.status == 0
    assert [row["path"] for row in csv.DictReader(io.StringIO(answer.out))] == [str(good)]
    assert answer.err.splitlines()[-1] == "esam-dist: 1 images, 2 passed over"
    assert sorted(re.findall(r"passed over \S+/(\S+) \((\w+)", caplog.text)) == [
        ("broken.jpg", "undecodable"),
        ("empty.png", "empty"),
    ]


def test_where_nothing_can_be_read_nothing_is_written_and_the_status_is_2(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    answer = here("predict", run, tmp_path / "broken.jpg", "--workers", 0, "--output", tmp_path / "p.csv")
    assert answer.status == 2
    assert "none of 1 files" in answer.err
    assert here("predict", run, tmp_path / "broken.jpg", "--workers", 0).out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jpg"]


def test_a_checkpoint_of_an_earlier_version_is_read_with_the_runs_configuration_and_data(run, tmp_path, caplog):
    old = shutil.copytree(run, tmp_path / "run")
    forget_card(old)
    assert exported(old, tmp_path / "m.safetensors")["classes"] == list(NAMES)
    text = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(re.sub(r"^  path: .*$", "  path: nowhere", text, flags=re.MULTILINE))
    sidecar = exported(old, tmp_path / "m.safetensors")
    assert (sidecar["classes"], sidecar["num_outputs"], sidecar["data"]) == ([], 10, None)
    assert "numbers stand for their names" in caplog.text


def forget_card(run):
    """What an earlier version would have written."""
    path = run / "checkpoints/step_00000010"
    state = torch.load(path / "state.pt", weights_only=True)
    del state["card"]
    torch.save(state, path / "state.pt")
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(metadata | {"sha256": sha256(path / "state.pt")}))
