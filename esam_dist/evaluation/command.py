"""`esam-dist evaluate RUN`: scores a checkpoint, and writes down what it gets wrong."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from pathlib import Path
from typing import Any

from torch import nn

from esam_dist import config, findings
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import ValidationData, open_validation
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError
from esam_dist.evaluation import measures
from esam_dist.evaluation.classes import output_names, places, run_classes
from esam_dist.evaluation.corruptions import Corruption, chosen
from esam_dist.evaluation.pictures import picture
from esam_dist.evaluation.predictions import Predictions, predict
from esam_dist.evaluation.summary import summary
from esam_dist.findings import CorruptionScore, Findings, Mistake
from esam_dist.launch import lifeline
from esam_dist.network import build_network
from esam_dist.ranks import Ranks, joined
from esam_dist.resume import choose, run_config, take_weights

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist evaluate` on `parser`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to its configuration")
    parser.add_argument("--averaged", action="store_true", help="the averaged weights (train.average)")
    parser.add_argument("--checkpoint", default="best", help="best (default), newest, a step's name or number, a path")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="another prepared dataset with classes of the run")
    parser.add_argument("--split", default="validation", choices=("validation", "test"), help="whose images to score")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file (default: evaluation.json in RUN)")
    parser.add_argument("--worst", type=int, default=20, metavar="N", help="mistakes to list (default: 20)")
    parser.add_argument(
        "--corruptions", metavar="all|NAME,...", help="also accuracy on images that are corrupted as in ImageNet-C"
    )
    parser.add_argument("--severities", default="1,2,3,4,5", metavar="1,...", help="of --corruptions (default: all)")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist evaluate`, alone or as one rank. Raises UserError, before ranks meet, for what is wrong."""
    # There is nothing to finish in order: a signal ends the rank at once, and without a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    lifeline.hold()
    ranks = Ranks.from_environment()
    cfg = _configuration(args)
    out = _output(args, ranks)
    corruptions = chosen(args.corruptions, args.severities, cfg.data.image_size) if args.corruptions else []
    path, state = choose(Checkpoints(args.run_folder / "checkpoints", cfg.checkpoint.keep), args.checkpoint)
    names = run_classes(cfg, state)
    data_cfg = cfg.data if args.data is None else cfg.data.model_copy(update={"path": args.data})
    data = _open(data_cfg, ranks, args.split)
    outputs = places(data.split.class_names, names, data_cfg.path)
    module = build_network(cfg, len(names), ranks.device)
    take_weights(module, (path, state), cfg, averaged=args.averaged)
    del state
    with joined(cfg.engine.collective_timeout_seconds) as ranks:
        found = predict(module, data, outputs, ranks)
        scores = [_corrupted(module, data_cfg, corruption, (outputs, args.split, ranks)) for corruption in corruptions]
    if ranks.is_first:
        written = _findings(found, data, data_cfg, output_names(names, cfg.model.num_classes or len(names)), args.worst)
        about = {"checkpoint": str(path), "averaged": args.averaged, "data": str(data_cfg.path)}
        whole = Findings(**about, **written, corruptions=scores)
        print(summary(whole))  # noqa: T201
        _write(out, whole)
        print(f"written to {out}")  # noqa: T201
    return 0


def _configuration(args: argparse.Namespace) -> config.Config:
    if args.worst < 0:
        raise UserError(f"--worst {args.worst}: give a number of mistakes to list, 0 or more")
    return run_config(args.run_folder, args.overrides)


def _output(args: argparse.Namespace, ranks: Ranks) -> Path:
    """Where to write: what is found of other images does not take the place of what was found of the run's own."""
    if args.output is not None:
        out: Path = args.output
    else:
        stem, suffix = findings.FILE.split(".")
        others = [] if args.data is None else [args.data.resolve().name]
        others += [] if args.split == "validation" else [args.split]
        out = args.run_folder / f"{'_'.join([stem, *others])}.{suffix}"
    # Sooner said than after an hour.
    if ranks.is_first and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise UserError(f"{out}: cannot be written; give another file (--output FILE)")
    return out


def _open(cfg: DataKeys, ranks: Ranks, split: str) -> ValidationData:
    return open_validation(cfg, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, split=split)


def _corrupted(
    module: nn.Module, cfg: DataKeys, corruption: Corruption, over: tuple[list[int], str, Ranks]
) -> CorruptionScore:
    """Accuracy on images that are corrupted in one way; `over`: outputs of the classes, the split, the ranks."""
    outputs, split, ranks = over
    data = _open(cfg, ranks, split)
    data.change_by(corruption)
    found = predict(module, data, outputs, ranks)
    score = CorruptionScore(
        name=corruption.name, severity=corruption.severity, accuracy=found.is_right.mean(), loss=found.loss.mean()
    )
    if ranks.is_first:
        log.info("%s, severity %d: accuracy %.4f", score.name, score.severity, score.accuracy)
    return score


def _findings(
    found: Predictions, data: ValidationData, cfg: DataKeys, names: list[str], num_worst: int
) -> dict[str, Any]:
    """The fields of Findings that follow from predictions."""
    error, bins = measures.calibration(found.confidence, found.is_right)
    return {
        "num_samples": len(found),
        "left_out": data.num_samples - len(found),
        "accuracy": found.is_right.mean(),
        "top5_accuracy": found.in_top5.mean(),
        "loss": found.loss.mean(),
        "calibration_error": error,
        "bins": bins,
        "classes": measures.class_scores(found, names),
        "confusion": measures.confusion(found),
        "mistakes": [_mistake(found, place, data, cfg) for place in measures.worst(found, num_worst)],
    }


def _mistake(found: Predictions, place: int, data: ValidationData, cfg: DataKeys) -> Mistake:
    sample = int(found.ids[place])
    return Mistake(
        sample=data.split.describe(sample),
        true=int(found.labels[place]),
        predicted=int(found.predicted[place]),
        confidence=float(found.confidence[place]),
        loss=float(found.loss[place]),
        picture=picture(data.split, sample, cfg),
    )


def _write(out: Path, whole: Findings) -> None:
    try:
        findings.write(out, whole)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another file (--output FILE)") from None
