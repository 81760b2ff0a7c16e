"""Shipping in its long form: every format, every engine, networks of every kind, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from esam_dist.models import Classifier, build_model
from esam_dist.ship import formats
from tests.commands import ROOT, environment, here, on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NETWORK = "shufflenet_v2_x0_5"
ENGINES = [
    pytest.param(("engine.name=native",), id="native"),
    *(pytest.param(("engine.name=deepspeed", f"engine.zero_stage={stage}"), id=f"zero{stage}") for stage in range(4)),
]


def words(folder):
    return (f"run.folder={folder}", f"model.name={NETWORK}", "data.image_size=32", "train.epochs=1")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    answer = here("train", tiny, *words(folder))
    assert answer.status == 0, answer.err
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(9):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{number}.jpg")
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_runs_of_every_engine_on_two_ranks_are_exported_alike(tiny, tmp_path, engine):
    for answer in on_ranks("train", tiny, *words(tmp_path), *engine, "method.name=sam", "train.max_steps=2"):
        assert answer.status == 0, answer.err
    assert here("export", tmp_path).status == 0
    plain = torchvision.models.get_model(NETWORK, weights=None, num_classes=10).eval()
    plain.load_state_dict(load_file(tmp_path / "export/model.safetensors"))
    ours = Classifier(build_model(NETWORK, 10)).eval()
    state = torch.load(tmp_path / "checkpoints/step_00000002/state.pt", weights_only=True)
    ours.load_state_dict(state["engine"]["model"])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(images), ours(images))


def probabilities(text):
    rows = map(json.loads, text.splitlines())
    return np.array([[guess["probability"] for guess in row["predictions"]] for row in rows])


def test_onnx_has_the_probabilities_of_the_run_and_images_in_any_number(run, pictures, tmp_path):
    assert here("export", run, "--output", tmp_path / "m.onnx").status == 0
    told = [
        here("predict", model, pictures, "--top", 4, "--format", "jsonl", "--workers", 0)
        for model in (run, tmp_path / "m.onnx")
    ]
    assert [answer.status for answer in told] == [0, 0]
    np.testing.assert_allclose(probabilities(told[0].out), probabilities(told[1].out), atol=1e-4)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(["logits"], {"images": np.zeros((11, 3, 32, 32), np.float32)})[0].shape == (11, 10)


@pytest.mark.parametrize("name", ["torchscript", "torch.export"])
def test_the_others_are_written_and_predict_refuses_what_may_hold_code(run, pictures, name):
    assert here("export", run, "--format", name).status == 0
    path = run / "export" / f"model{formats.FORMATS[name].suffix}"
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["format"] == name
    answer = here("predict", path, pictures)
    assert answer.status == 2
    assert f"a file of {name}, which may hold code" in answer.err


KINDS = [
    *(("mobilenet_v3_small", 32), ("densenet121", 32), ("efficientnet_b0", 32), ("convnext_tiny", 32)),
    *(("regnet_y_400mf", 32), ("inception_v3", 96), ("swin_t", 64), ("vit_s_16", 224), ("maxvit_t", 224)),
]


@pytest.mark.parametrize(("model", "size"), KINDS)
@pytest.mark.parametrize("name", ["safetensors", "torchscript", "torch.export"])
def test_networks_of_every_kind_are_written(tmp_path, model, size, name):
    torch.manual_seed(0)
    formats.write(name, build_model(model, 7).requires_grad_(False).eval(), size, tmp_path / "m")


@pytest.mark.parametrize(("model", "size"), [("vit_s_16", 224), ("swin_t", 64), ("inception_v3", 96)])
def test_onnx_is_written_of_every_kind(tmp_path, model, size):
    torch.manual_seed(0)
    formats.write("onnx", build_model(model, 7).requires_grad_(False).eval(), size, tmp_path / "m.onnx")


def test_in_a_process_of_its_own_with_workers_and_a_reader_that_has_seen_enough(run, pictures):
    command = [sys.executable, "-m", "esam_dist", "predict", str(run), *[str(pictures)] * 2000, "--workers", "2"]
    # Text that is not ASCII goes out as UTF-8 whatever the locale says.
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", CUDA_VISIBLE_DEVICES="")
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert first == b"path,class_1,probability_1\n"
    assert process.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in said


def test_names_that_are_no_utf8_keep_their_bytes(run, pictures, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(odd, "wb") as file:
        file.write((pictures / "0.jpg").read_bytes())
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", CUDA_VISIBLE_DEVICES="")
    for form, shown in (("csv", odd), ("jsonl", odd.replace(b"\xff", rb"\udcff"))):
        command = [sys.executable, "-m", "esam_dist", "predict", run, tmp_path, "--workers", "0", "--format", form]
        ended = subprocess.run(list(map(str, command)), env=env, capture_output=True, check=True)
        assert shown in ended.stdout, ended.stderr


def test_the_programs_of_the_page_do_what_it_says(run, pictures, tmp_path):
    for name in ("photos.safetensors", "photos.onnx"):
        assert here("export", run, "--output", tmp_path / name).status == 0
    (tmp_path / "portrait.jpg").write_bytes((pictures / "0.jpg").read_bytes())
    page = (ROOT / "docs/ship.md").read_text()
    programs = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        # The run's images are smaller than those of the page.
        command = [sys.executable, "-c", program.replace("224, 224", "32, 32")]
        ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("('") == (3 if "torchvision" in program else 0)
