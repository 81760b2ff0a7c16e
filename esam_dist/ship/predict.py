"""`esam-dist predict MODEL PATHS...`: what images show, by a run, a checkpoint or an exported file."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esam_dist.checksum import sha256
from esam_dist.data.open_files import check_open_files
from esam_dist.data.prepare.write import Progress
from esam_dist.data.raw import Raw
from esam_dist.errors import UserError
from esam_dist.models import Classifier
from esam_dist.ranks import CPU, Ranks
from esam_dist.ship import formats, images, rows, trained
from esam_dist.ship.card import Card, Sidecar, read_sidecar
from esam_dist.ship.rows import Guess

READABLE = ("safetensors", "state_dict", "onnx")
"""Formats from which `predict` reads; a file of the others may hold code."""


class Model(NamedTuple):
    """A network that is ready, and what must be known of it."""

    card: Card
    forward: formats.Forward
    device: torch.device


class _Count:
    """Notes what comes from the workers: the bad files are named, and all are counted."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.good, self.bad = 0, 0

    def __call__(self, raw: Raw) -> None:
        images.say_skipped(raw.skips)
        self.good, self.bad = self.good + len(raw.labels), self.bad + len(raw.skips)
        self._progress.add(raw.num_read)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist predict` on `parser`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a run or checkpoint, or exported file")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="image, or folder of images at any depth")
    trained.add_arguments(parser)
    parser.add_argument("--top", type=int, default=1, metavar="K", help="most probable classes of each (default: 1)")
    parser.add_argument("--format", choices=rows.FORMS, default="csv", help="default: csv")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    cores = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"decoding processes (here: {cores})")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist predict`. Raises UserError for a mistake, and where no image can be read."""
    _check(args)
    model = _model(args)
    paths = images.find(args.paths)
    try:
        # On a terminal, rows and a bar would write over each other.
        with Progress(len(paths), no_bar=args.output is None and sys.stdout.isatty()) as progress:
            count = _Count(progress)
            _predict(args, model, paths, count)
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does; what is left unwritten must not be tried again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        where = "standard output" if args.output is None else f"--output {args.output}"
        raise UserError(f"{where}: cannot be written ({error.strerror}); give another --output") from None
    told = f"esam-dist: {count.good} images, {count.bad} passed over"
    print(told, file=sys.stderr)  # noqa: T201
    return 0


def _check(args: argparse.Namespace) -> None:
    trained.check_alone("predict")
    for flag, value, least in (("top", args.top, 1), ("batch-size", args.batch_size, 1), ("workers", args.workers, 0)):
        if value < least:
            raise UserError(f"--{flag} {value} is out of range; give {least} or more")
    if args.output is not None and args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; give the path of a file")
    check_open_files(args.workers, "--workers")


def _predict(args: argparse.Namespace, model: Model, paths: list[Path], count: _Count) -> None:
    top, form = min(args.top, model.card.num_outputs), rows.FORMS[args.format]
    size = min(args.batch_size, len(paths))
    cfg = model.card.keys(batch_size=size, workers=min(args.workers, -(-len(paths) // size)))
    batches = images.batches(images.Files(paths), cfg, model.device, count)
    with rows.opened(args.output, form.errors) as file, torch.inference_mode():
        write: rows.Write | None = None
        for batch in batches:
            # The line of names with the first row: where there is none, nothing is written.
            write = write or form.begin(file, top)
            for number, guesses in zip(batch.labels.tolist(), _guesses(model, batch.images, top), strict=True):
                write(str(paths[number]), guesses)
        if not count.good:
            raise UserError(f"PATHS: none of {count.bad} files can be read as an image; see the lines above")


def _guesses(model: Model, shown: Tensor, top: int) -> list[list[Guess]]:
    logits = model.forward(shown).float()
    # As `evaluate` ranks them: to softmax, two that differ may be equal.
    best = logits.topk(top, dim=1).indices
    rows_of = zip(best.tolist(), logits.softmax(dim=1).gather(1, best).tolist(), strict=True)
    return [
        [Guess(model.card.name(output), output, share) for output, share in zip(outputs, shares, strict=True)]
        for outputs, shares in rows_of
    ]


def _model(args: argparse.Namespace) -> Model:
    device = Ranks.from_environment().device
    file = _exported_file(args.model)
    if file is not None:
        if args.averaged or args.checkpoint:
            raise UserError(f"MODEL = {file}: is one exported file; leave --checkpoint and --averaged out")
        return _exported(file, device)
    found = trained.find(args.model, args, "MODEL")
    card = found.card
    classifier = Classifier(found.network(), card.precision, channels_last=card.channels_last)
    return Model(card, _ready(classifier, device), device)


def _exported_file(model: Path) -> Path | None:
    """The exported file that is meant, also by its sidecar; None for a run or a checkpoint."""
    if not model.is_file() or model.name == "state.pt":
        return None
    return model.with_suffix("") if model.suffix == ".json" and model.with_suffix("").is_file() else model


def _exported(file: Path, device: torch.device) -> Model:
    sidecar = read_sidecar(file)
    if sidecar.format not in READABLE:
        raise UserError(
            f"MODEL = {file}: predict does not run a file of {sidecar.format}, which may hold code; give one of "
            f"{', '.join(READABLE)}, or the run"
        )
    if sha256(file) != sidecar.sha256:
        raise UserError(f"MODEL = {file}: is not the file that its sidecar describes; export again")
    return _forward(file, sidecar, device)


def _forward(file: Path, sidecar: Sidecar, device: torch.device) -> Model:
    if sidecar.format == "onnx":
        return Model(sidecar, formats.read_onnx(file), CPU)
    network = trained.filled(sidecar, formats.read_weights(sidecar.format, file), f"MODEL = {file}")
    return Model(sidecar, _ready(network, device), device)


def _ready(network: torch.nn.Module, device: torch.device) -> formats.Forward:
    return network.to(device).eval()
