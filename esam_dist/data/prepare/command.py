"""The arguments of `esam-dist prepare`, and what they start."""

from __future__ import annotations

import argparse
from pathlib import Path

from esam_dist.data.prepare.digits import prepare_digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `prepare SOURCE OUT [options]` on `parser`."""
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    digits = sources.add_parser("digits", help="scikit-learn's handwritten digits (8x8, 1,797 images)")
    digits.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    digits.add_argument("--seed", type=int, default=0, help="split and order of the samples (default: 0)")


def run(args: argparse.Namespace) -> None:
    """Prepare what the arguments ask for."""
    prepare_digits(args.out, seed=args.seed)
