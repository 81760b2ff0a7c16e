"""The whole job: pictures in folders, a pretrained file, a network to ship: one command each."""

import json
import subprocess
import sys

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2

from tests.commands import ROOT, environment
from tests.prepared import class_folders

pytestmark = pytest.mark.slow
NETWORK = "shufflenet_v2_x0_5"


def do(*words):
    command = [sys.executable, "-m", "esam_dist", *map(str, words)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_from_a_folder_of_pictures_and_a_pretrained_file_to_predictions_by_plain_torchvision(tmp_path):
    photos, run = class_folders(tmp_path / "photos"), tmp_path / "runs/photos"
    torch.manual_seed(0)
    pretrained = torchvision.models.get_model(NETWORK, num_classes=1000)
    torch.save(pretrained.state_dict(), tmp_path / "pretrained.pth")

    do("prepare", "folder", tmp_path / "data", "--from", photos, "--validation-share", "0.25")
    do("init", tmp_path / "data", "--model", NETWORK, "--output", tmp_path / "photos.yaml")
    words = (f"run.folder={run}", f"model.weights={tmp_path / 'pretrained.pth'}", "train.epochs=2", "data.batch_size=8")
    trained = do("launch", tmp_path / "photos.yaml", "--nproc-per-node=2", "--no-checks", *words)
    assert "tensors taken" in trained.stdout + trained.stderr
    do("evaluate", run, "--checkpoint", "newest")
    found = json.loads((run / "evaluation.json").read_text())
    assert sum(count for _, _, count in found["confusion"]) == found["num_samples"] == 15
    do("report", run)
    assert "export" in (run / "report.html").read_text()
    do("export", run, "--checkpoint", "newest", "--output", tmp_path / "model.safetensors")
    told = do("predict", tmp_path / "model.safetensors", photos, "--format", "jsonl").stdout
    rows = [json.loads(line) for line in told.splitlines()]

    # Plain torchvision from here on, by what the sidecar says.
    card = json.loads((tmp_path / "model.safetensors.json").read_text())
    network = torchvision.models.get_model(NETWORK, num_classes=len(card["classes"]))
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    network.eval()
    size = card["image_size"]
    pixels = v2.Compose(
        [
            v2.Resize(round(size / card["crop_ratio"])),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(card["mean"], card["std"]),
        ]
    )
    likest = []
    for row in rows:
        image = v2.functional.pil_to_tensor(Image.open(row["path"]).convert("RGB"))
        with torch.no_grad():
            shares = network(pixels(image).unsqueeze(0)).softmax(1)[0]
        top = row["predictions"][0]
        # The crop and the resizing are torchvision's own here, so that pixels differ by a little.
        likest.append(abs(float(shares[top["output"]]) - top["probability"]) < 0.05)
    assert len(rows) == sum(1 for path in photos.rglob("*") if path.is_file())
    assert sum(likest) >= 0.9 * len(likest)
