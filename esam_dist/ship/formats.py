"""The formats of exported files: how each is written and read, and how far what is read may differ from what was.

Letters: B images, S image size in pixels, K outputs.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esam_dist.errors import UserError

Forward = Callable[[Tensor], Tensor]
"""Normalised float32 images [B, 3, S, S] to logits [B, K]."""

TOLERANCE = 1e-4
"""Of logits, against those of the network, relative to the largest of them where that is more than 1."""

PROTOBUF_BYTES = 2**31 - 2**20
"""A file of ONNX holds no more."""

_BATCHES = (1, 2, 5)
WRITE_ONNX = ("onnx", "onnxruntime", "onnxscript")
READ_ONNX = ("onnxruntime",)


class Format(NamedTuple):
    """One format."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path], None]
    """Given example images [2, 3, S, S]."""
    weights: Callable[[Path], dict[str, Tensor]] | None = None
    """Reads a file of weights; None for one that holds the whole network."""
    forward: Callable[[Path], Forward] | None = None
    """Reads a file of a network."""


def check_installed(packages: Iterable[str], key: str) -> None:
    """Raise UserError, naming `key`, where packages are not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"{key}: {' and '.join(missing)} not installed; pip install 'esam-dist[export]'")


def write(name: str, network: nn.Module, size: int, path: Path) -> None:
    """Write the network to `path`, read it back and compare.

    Raises UserError where the network cannot be written so, or comes back otherwise, and OSError for the disk.
    """
    form = FORMATS[name]
    if name == "onnx" and sum(tensor.nbytes for tensor in network.state_dict().values()) > PROTOBUF_BYTES:
        raise UserError("--format onnx: a file holds 2 GB at most, and these weights are more; give torch.export")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, size, size, generator=generator) for count in _BATCHES]
    try:
        with _quiet():
            form.write(network, batches[1], path)
    except OSError:
        raise
    except Exception as error:  # whatever a tracer makes of a network
        raise UserError(
            f"--format {name}: this network cannot be written so ({_first_line(error)}); give safetensors"
        ) from error
    difference = _difference(form, network, batches, path)
    if difference:
        raise UserError(f"--format {name}: what was written is not what was trained ({difference}); give safetensors")


def read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """The weights in an exported file, by the plain network's names. Raises UserError."""
    read = FORMATS[name].weights
    assert read is not None
    try:
        return read(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read as {name} ({_first_line(error)}); export again") from None


def read_onnx(path: Path) -> Forward:
    """The network in a file of ONNX, on the CPU. Raises UserError."""
    check_installed(READ_ONNX, f"MODEL = {path}")
    try:
        return _onnx_forward(path)
    except Exception as error:  # errors of onnxruntime have no common base
        raise UserError(f"{path}: cannot be read as onnx ({_first_line(error)}); export again") from None


def _difference(form: Format, network: nn.Module, batches: list[Tensor], path: Path) -> str:
    """Where what is in `path` differs from the network; empty: nowhere."""
    if form.weights is not None:
        found, wanted = form.weights(path), network.state_dict()
        same = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        return "" if same else "other weights"
    assert form.forward is not None
    with _quiet():
        try:
            forward = form.forward(path)
            found_logits = [forward(images) for images in batches]
        except Exception as error:  # whatever another runtime makes of what it cannot run
            return f"it cannot be run: {_first_line(error)}"
        for images, logits in zip(batches, found_logits, strict=True):
            wanted_logits = network(images)
            most = (logits - wanted_logits).abs().max().item()
            if not most <= TOLERANCE * max(1.0, wanted_logits.abs().max().item()):
                return f"logits differ by {most:.2g} in a batch of {len(images)}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters say of themselves is not for the user: that they will change, and what they leave out."""
    named = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")
    levels = [logger.level for logger in named]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in named:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(named, levels, strict=True):
                logger.setLevel(level)


def _write_safetensors(network: nn.Module, _: Tensor, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path, {"format": "pt"})


def _write_state_dict(network: nn.Module, _: Tensor, path: Path) -> None:
    torch.save(network.state_dict(), path)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("no table of tensors")
    return dict(found)


def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


def _onnx_forward(path: Path) -> Forward:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torchscript(network: nn.Module, images: Tensor, path: Path) -> None:
    traced: Any = torch.jit.trace(network, images, check_trace=False)  # type: ignore[no-untyped-call]
    traced.save(str(path))


def _write_exported(network: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


def _torchscript_forward(path: Path) -> Forward:
    forward: Forward = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return forward


def _exported_forward(path: Path) -> Forward:
    forward: Forward = torch.export.load(path).module()
    return forward


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, weights=load_file),
    "state_dict": Format(".pth", _write_state_dict, weights=_read_state_dict),
    "onnx": Format(".onnx", _write_onnx, forward=_onnx_forward),
    "torchscript": Format(".pt", _write_torchscript, forward=_torchscript_forward),
    "torch.export": Format(".pt2", _write_exported, forward=_exported_forward),
}
"""By the name that `--format` takes."""
