"""The arguments of `esam-dist prepare`, and what they start."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from esam_dist.data.open_files import check_open_files
from esam_dist.data.prepare.arrays import cifar, fashion_mnist
from esam_dist.data.prepare.digits import Digits
from esam_dist.data.prepare.encode import JPEGTRAN, Encoding
from esam_dist.data.prepare.existing import index_existing
from esam_dist.data.prepare.folders import folders, has_class_folders
from esam_dist.data.prepare.imagenet import imagenet
from esam_dist.data.prepare.source import Source
from esam_dist.data.prepare.verify import verify
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.errors import UserError

SOURCES = {
    "digits": "scikit-learn's handwritten digits (1,797 images of 8x8, nothing to fetch)",
    "fashion-mnist": "idx files; without --from, those of Debian's package dataset-fashion-mnist",
    "cifar10": "python batches: --from their folder or .tar.gz",
    "cifar100": "python batches: --from their folder or .tar.gz",
    "imagenet": "--from the folder of ILSVRC2012_img_train.tar, _img_val.tar and the devkit, or of train/ and val/",
    "folder": "--from a folder with one folder of images per class, or with train/, val/, test/ of such",
    "index": "index shards that another program wrote to OUT/train/*.tar and OUT/validation/*.tar",
    "verify": "check OUT: counts, checksums, labels, decodability",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `prepare SOURCE OUT [options]` on `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sources:\n" + "\n".join(f"  {name:14} {text}" for name, text in SOURCES.items())
    parser.add_argument("source", choices=list(SOURCES), metavar="SOURCE", help="what to prepare, see below")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, or to check")
    parser.add_argument("--from", dest="origin", type=Path, metavar="PATH", help="where the source's files are")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' order and of a split (default: 0)")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="shrink larger images to this, as JPEG")
    parser.add_argument("--quality", type=int, default=90, help="of shrunk images (default: 90)")
    parser.add_argument("--keep-bytes", action="store_true", help="store the images' files as they are (the default)")
    parser.add_argument(
        "--restart-markers",
        action="store_true",
        help=f"rewrite JPEGs ({JPEGTRAN}; no pixel changes), so that only what is cropped need be decoded",
    )
    parser.add_argument("--validation-share", type=float, metavar="SHARE", help="held out of a `folder` (default: 0.1)")
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help="default: 1024 (digits: 360)")
    parser.add_argument("--num-classes", type=int, metavar="K", help="of `index`, if some class has no sample there")
    parser.add_argument("--limit-per-class", type=int, metavar="N", help="of a `folder`: a subset (docs/data.md)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")


def run(args: argparse.Namespace) -> None:
    """Prepare what the arguments ask for. Raises UserError."""
    _check(args)
    # Also to look at the source takes some; workers take theirs when they are started.
    check_open_files(0, "--workers")
    if args.source == "verify":
        verify(args.out, workers=args.workers)
    elif args.source == "index":
        index_existing(args.out, args.num_classes)
    else:
        per_shard = args.samples_per_shard or (360 if args.source == "digits" else 1024)
        plan = Plan(args.seed, per_shard, Encoding(args.short_side or 0, args.quality, args.restart_markers))
        write_dataset(_source_or_hint(args), args.out, plan, workers=args.workers)


def _check(args: argparse.Namespace) -> None:
    if args.keep_bytes and args.short_side:
        raise UserError("--keep-bytes and --short-side exclude each other; give one of them")
    if args.keep_bytes and args.restart_markers:
        raise UserError("--keep-bytes and --restart-markers exclude each other; give one of them")
    if args.restart_markers and shutil.which(JPEGTRAN) is None:
        raise UserError(
            f"--restart-markers: {JPEGTRAN} is not installed; install it (Debian: libjpeg-turbo-progs), or leave the "
            "option out"
        )
    for flag, low, high in (
        ("short_side", 8, 4096),
        ("quality", 1, 95),
        ("samples_per_shard", 1, 1_000_000),
        ("num_classes", 1, 1_000_000),
        ("limit_per_class", 1, 1_000_000_000),
    ):
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{flag.replace('_', '-')} {value} is out of range; give {low} to {high}")
    for flag, value, source in (
        ("--num-classes", args.num_classes, "index"),
        ("--limit-per-class", args.limit_per_class, "folder"),
    ):
        if value is not None and args.source != source:
            raise UserError(f"{flag} is for `prepare {source}` only; leave it out")
    if args.seed < 0 or args.workers < 0:
        raise UserError("--seed and --workers must not be negative; give 0 or more")
    if args.validation_share is not None and not 0.0 < args.validation_share < 1.0:
        raise UserError(f"--validation-share {args.validation_share:g} is out of range; give a share between 0 and 1")


def _source_or_hint(args: argparse.Namespace) -> Source:
    """The source; `prepare folder` is named where it is what was meant."""
    try:
        return _source(args)
    except UserError as error:
        if args.source == "folder" or args.origin is None or not has_class_folders(args.origin):
            raise
        meant = f"prepare folder {args.out} --from {args.origin}"
        raise UserError(f"{error}; or, as it has folders of images: `esam-dist {meant}`") from None


def _source(args: argparse.Namespace) -> Source:
    if args.source == "digits":
        return Digits(args.seed)
    if args.source == "fashion-mnist":
        return fashion_mnist(args.origin)
    if args.origin is None:
        raise UserError(f"prepare {args.source}: needs --from PATH; see `esam-dist prepare --help`")
    if args.source == "imagenet":
        return imagenet(args.origin)
    if args.source == "folder":
        return folders(args.origin, validation_share=args.validation_share, seed=args.seed, limit=args.limit_per_class)
    return cifar(args.source, args.origin)
