"""Exported files are what was trained, or are not kept."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from esam_dist.errors import UserError
from esam_dist.models import expression
from esam_dist.ship import formats


class Small(nn.Module):
    """What networks are made of: a convolution, BatchNorm with statistics, a mean, a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self(torch.randn(16, 3, 8, 8))
        self.requires_grad_(False).eval()

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


class Drawing(Small):
    """Another result each time."""

    def forward(self, images):
        return super().forward(images) + torch.rand(())


class OfTwo(Small):
    """Takes a batch of two only once it is traced."""

    def forward(self, images):
        return super().forward(images.reshape(len(images), 3, 8, 8))


class Odd(Small):
    """What no tracer follows."""

    def forward(self, images):
        if self.training:
            return super().forward(images)
        raise RuntimeError("cannot be\nfollowed")


def test_onnx_takes_batches_of_any_size_and_gives_the_same_logits(tmp_path):
    network, path = Small(), tmp_path / "m.onnx"
    formats.write("onnx", network, 8, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        images = torch.randn(count, 3, 8, 8)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, network(images).numpy(), atol=1e-4)
        np.testing.assert_array_equal(formats.read_onnx(path)(images).numpy(), logits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_torchscript_runs_without_this_package(tmp_path):
    network, path = Small(), tmp_path / "m.pt"
    formats.write("torchscript", network, 8, path)
    with pytest.warns(FutureWarning, match="deprecated"):
        loaded = torch.jit.load(str(path))
    images = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(loaded(images), network(images))


def test_what_comes_back_otherwise_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--format torchscript: .*not what was trained \(logits differ by"):
        formats.write("torchscript", Drawing(), 8, tmp_path / "m.pt")


def test_what_takes_no_batch_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="it cannot be run"):
        formats.write("torchscript", OfTwo(), 8, tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["torchscript", "torch.export"])
def test_what_cannot_be_written_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=f"--format {name}: this network cannot be written so") as refused:
        formats.write(name, Odd(), 8, tmp_path / "m")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["safetensors", "state_dict"])
def test_weights_that_come_back_otherwise_are_refused(tmp_path, monkeypatch, name):
    form = formats.FORMATS[name]
    read = form.weights
    monkeypatch.setitem(
        formats.FORMATS,
        name,
        form._replace(weights=lambda path: {key: value.nextafter(value + 1) for key, value in read(path).items()}),
    )
    with pytest.raises(UserError, match="other weights"):
        formats.write(name, nn.Linear(3, 2), 8, tmp_path / "m")


@pytest.mark.parametrize("name", ["safetensors", "state_dict"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"no weights"])
def test_damaged_weights_are_one_line(tmp_path, name, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(UserError, match=f"m: cannot be read as {name}"):
        formats.read_weights(name, tmp_path / "m")


def test_damaged_onnx_is_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"m.onnx: cannot be read as onnx"):
        formats.read_onnx(tmp_path / "m.onnx")


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"weight": Evil()}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="cannot be read as state_dict"):
        formats.read_weights("state_dict", tmp_path / "m.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"--format onnx: onnxscript not installed; pip install 'esam-dist\[export\]'"):
        formats.check_installed(formats.WRITE_ONNX, "--format onnx")
    formats.check_installed(formats.READ_ONNX, "MODEL")


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_1"])
def test_the_expression_makes_torchvisions_network(name):
    import torchvision

    made = expression(name, 3)
    assert made.startswith(f"torchvision.models.get_model('{name}', weights=None, num_classes=3")
    assert ("aux_logits=False" in made) is (name == "googlenet")
    assert expression("cifar_resnet8", 3) == "esam_dist.models.build_model('cifar_resnet8', 3)"
    if name == "squeezenet1_1":
        assert eval(made, {"torchvision": torchvision})(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
