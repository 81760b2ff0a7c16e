"""`esam-dist models [PATTERN]`: every network that `model.name` takes."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Iterator

import torch
import torchvision

from esam_dist.errors import UserError, printable
from esam_dist.models import build_model, model_names
from esam_dist.models.build import OURS
from esam_dist.report.command import in_columns

CLASSES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist models` on `parser`."""
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'resnet*', or part of one")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist models`. Raises UserError where no name fits the pattern."""
    names = matching(args.pattern)
    if not names:
        raise UserError(f"models {printable(args.pattern)!r}: no network has such a name; `esam-dist models` lists all")
    print(in_columns([["model.name", "parameters", "from"], *(list(row(name)) for name in names)]))  # noqa: T201
    print(f"\nParameters with {CLASSES} classes.")  # noqa: T201
    return 0


def matching(pattern: str) -> list[str]:
    """The names that fit a pattern of the shell, or hold it where it has no wildcard."""
    wild = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    return [name for name in model_names() if fnmatch.fnmatchcase(name, wild)]


def row(name: str) -> Iterator[str]:
    """Name, parameters and origin of a network."""
    yield name
    yield f"{num_parameters(name) / 1e6:.2f} M"
    yield "esam_dist" if name in OURS else "torchvision"


def num_parameters(name: str) -> int:
    """Of a network with 1000 classes: torchvision's own figure, which costs nothing; ours are built without memory."""
    if name in OURS:
        with torch.device("meta"):
            return sum(param.numel() for param in build_model(name, CLASSES).parameters())
    weights = torchvision.models.get_model_weights(name)
    return int(next(iter(weights)).meta["num_params"])
