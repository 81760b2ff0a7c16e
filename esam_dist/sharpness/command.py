"""`esam-dist sharpness RUN...`: measures checkpoints, writes `sharpness.json` into their runs, and one page."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from esam_dist import __version__
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import Batch, open_samples
from esam_dist.errors import UserError
from esam_dist.files import write_file
from esam_dist.network import build_network
from esam_dist.ranks import Ranks, joined
from esam_dist.report.command import in_columns
from esam_dist.resume import choose, run_config, take_weights
from esam_dist.sharpness import page
from esam_dist.sharpness.measure import Wanted, measure
from esam_dist.sharpness.objective import Objective

log = logging.getLogger(__name__)
RESULT = "sharpness.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist sharpness` on `parser`."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, to be compared by the same samples")
    add("--checkpoint", default="newest", help="newest (default), best, a step's name, or a path")
    add("--averaged", action="store_true", help="the averaged weights (train.average)")
    add("--split", choices=("train", "validation"), default="train", help="whose samples, without augmentation")
    add("--samples", type=_count, default=1024, help="how many, spread evenly over the split (1024; 0: all)")
    add("--eigenvalues", type=_count, default=3, help="how many of the Hessian's largest (3)")
    add("--tolerance", type=_positive, default=1e-3, help="relative, of the eigenvalues (1e-3)")
    add("--probes", type=_count, default=10, help="random vectors for the trace (10)")
    add("--rho", type=_positive, nargs="+", default=[0.01, 0.05, 0.1, 0.2], help="distances (0.01 0.05 0.1 0.2)")
    add("--group-size", type=_count, nargs="+", default=[32], help="the m of m-sharpness (32)")
    add("--draws", type=_count, default=5, help="random directions of the average rise (5)")
    add("--adaptive", action="store_true", help="distances relative to each weight's size, as ASAM's")
    add("--line", type=_count, default=21, help="points of the landscape along a line (21)")
    add("--plane", type=_count, default=0, help="points on each side of the landscape on a plane (0: none)")
    add("--seed", type=_count, default=0, help="of all random directions (0)")
    add("--double", action="store_true", help="compute in float64")
    add("--out", type=Path, help="the page (default: sharpness.html in the first run's folder)")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist sharpness`, alone or as one of several ranks. Raises UserError for what cannot be done."""
    _check(args)
    wanted = Wanted(
        eigenvalues=args.eigenvalues,
        tolerance=args.tolerance,
        probes=args.probes,
        rhos=sorted(args.rho),
        group_sizes=sorted(args.group_size),
        draws=args.draws,
        adaptive=args.adaptive,
        line=args.line,
        plane=args.plane,
        seed=args.seed,
    )
    opened = [_Opened(folder, args, Ranks.from_environment()) for folder in args.runs]
    measured: dict[str, page.Found] = {}
    with joined(opened[0].cfg.engine.collective_timeout_seconds) as ranks:
        for one in opened:
            if ranks.is_first:
                log.info("%s", one.path)
            found = one.about | measure(one.objective(ranks), wanted)
            measured[str(one.folder)] = found
            if ranks.is_first:
                _write(one.folder / RESULT, json.dumps(found, indent=1))
    if ranks.is_first:
        out: Path = args.out or args.runs[0] / "sharpness.html"
        _write(out, page.page(measured))
        print(in_columns([page.columns(measured), *(page.row(name, measured) for name in measured)]))  # noqa: T201
        print(f"written to {out}, and {RESULT} in each run")  # noqa: T201
    return 0


class _Opened:
    """One run's checkpoint and samples, found and checked before any rank waits for another."""

    def __init__(self, folder: Path, args: argparse.Namespace, ranks: Ranks) -> None:
        self.folder = folder
        # Second derivatives need what autocast and compilation leave out.
        plain = ["train.precision=fp32", "train.compile=false", "data.workers=0"]
        self.cfg = run_config(folder, plain)
        self.path, state = choose(Checkpoints(folder / "checkpoints", self.cfg.checkpoint.keep), args.checkpoint)
        self._data = open_samples(self.cfg.data, ranks, split=args.split, most=args.samples)
        self._module = build_network(self.cfg, self._data.num_classes, ranks.device)
        take_weights(self._module, (self.path, state), self.cfg, averaged=args.averaged)
        self._kind = torch.float64 if args.double else torch.float32
        self.about: dict[str, Any] = {
            "checkpoint": str(self.path),
            "averaged": args.averaged,
            "split": args.split,
            "seed": args.seed,
            "precision": str(self._kind).removeprefix("torch."),
            "versions": {"esam_dist": __version__, "torch": torch.__version__},
        }

    def objective(self, ranks: Ranks) -> Objective:
        """The loss of this run's samples at its weights."""
        return Objective(self._module.to(self._kind), list(self._batches()), ranks)

    def _batches(self) -> Iterator[Batch]:
        for images, labels in self._data.batches():
            yield Batch(images.to(self._kind), labels)


def _check(args: argparse.Namespace) -> None:
    if 1 in (args.probes, args.draws):
        raise UserError("--probes and --draws: an error needs at least two draws; give 0, or 2 and more")
    if 0 in args.group_size:
        raise UserError("--group-size 0: a group has at least one sample; give 1 or more")
    if 1 in (args.line, args.plane):
        raise UserError("--line and --plane: one point is no landscape; give 0, or 2 and more")


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give --out FILE, or free the disk") from None


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise ValueError
    return count


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise ValueError
    return value


_count.__name__, _positive.__name__ = "count", "positive number"  # as argparse says them
