"""`esam-dist export RUN`: writes the weights of a run for others to use, and beside them what must be known of them."""

from __future__ import annotations

import argparse
import secrets
from importlib import metadata
from pathlib import Path

import torch

from esam_dist import __version__
from esam_dist.checksum import sha256
from esam_dist.errors import UserError
from esam_dist.files import PARTIAL, flush_folder, write_file
from esam_dist.models import expression
from esam_dist.ship import formats, trained
from esam_dist.ship.card import Sidecar, sidecar_path
from esam_dist.ship.formats import FORMATS
from esam_dist.ship.trained import Trained

INPUT = "float32 images [B, 3, {size}, {size}], RGB from 0 to 1, less mean, divided by std; B is free"
OUTPUT = "logits [B, {outputs}], in the order of classes; softmax makes them probabilities"
PREPROCESSING = (
    "turned upright by EXIF; the centred square of {ratio:g} times the shorter side, resized to {size} pixels "
    "(bilinear, antialiased where it shrinks); torchvision: Resize({resize}), CenterCrop({size})"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist export` on `parser`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run, or of a checkpoint")
    parser.add_argument("--format", choices=FORMATS, help="default: as --output is called, else safetensors")
    trained.add_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="PATH", help="file (default: RUN/export/model.SUFFIX)")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist export`. Raises UserError for what is wrong with the run, the file or the format."""
    trained.check_alone("export")
    name = _format(args)
    formats.check_installed(formats.WRITE_ONNX if name == "onnx" else (), f"--format {name}")
    model = trained.find(args.run_folder, args)
    path = _path(args.output, model, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(model, name, path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error}); give another path") from None
    measured = "accuracy not measured" if model.accuracy is None else f"validation accuracy {model.accuracy:.4f}"
    which = f"{model.checkpoint}{', averaged' if model.averaged else ''}"
    print(f"{path}: {model.card.model}, {len(model.card.classes)} classes, {measured} ({which})")  # noqa: T201
    return 0


def _format(args: argparse.Namespace) -> str:
    named = {form.suffix: name for name, form in FORMATS.items()}.get(args.output.suffix) if args.output else None
    if args.format and named and args.format != named and {args.format, args.output.suffix} != {"state_dict", ".pt"}:
        raise UserError(
            f"--output {args.output}: is called like a file of {named}, not of --format {args.format}; give a name "
            f"that ends in {FORMATS[args.format].suffix}"
        )
    if named == "torchscript" and not args.format:
        raise UserError(f"--output {args.output}: say with --format whether it is to be state_dict or torchscript")
    return str(args.format or named or "safetensors")


def _path(output: Path | None, model: Trained, name: str) -> Path:
    file = f"model{'_averaged' if model.averaged else ''}{FORMATS[name].suffix}"
    if output is None:
        return model.run / "export" / file
    return output / file if output.is_dir() else output


def _write(model: Trained, name: str, path: Path) -> None:
    """The file and its sidecar; under its name the file is only when it was read back and compared."""
    beside = path.with_name(f".{secrets.token_hex(4)}{PARTIAL}{path.suffix}")
    try:
        formats.write(name, model.network(), model.card.image_size, beside)
        sidecar = _sidecar(model, name, sha256(beside))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_folder(path.parent)
    write_file(sidecar_path(path), sidecar.model_dump_json(indent=1) + "\n")


def _sidecar(model: Trained, name: str, checksum: str) -> Sidecar:
    card = model.card
    size, ratio = card.image_size, card.crop_ratio
    versions = {"esam_dist": __version__, "torch": torch.__version__, "torchvision": metadata.version("torchvision")}
    if name == "onnx":
        versions["onnx"] = metadata.version("onnx")
    return Sidecar(
        **card.model_dump(),
        format=name,
        sha256=checksum,
        build=expression(card.model, card.num_outputs, card.options),
        input=INPUT.format(size=size),
        preprocessing=PREPROCESSING.format(ratio=ratio, size=size, resize=round(size / ratio)),
        output=OUTPUT.format(outputs=card.num_outputs),
        run=model.run.absolute().name,
        checkpoint=model.checkpoint.name,
        step=model.step,
        averaged=model.averaged,
        accuracy=model.accuracy,
        versions=versions,
    )
