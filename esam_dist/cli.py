"""The commands. Each parses, builds every part, runs and closes: the only file that knows all others."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch import nn

from esam_dist import __version__, compare, config, launch, report
from esam_dist.averaging import WeightAverage, averaged_model
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import TrainData, open_train, open_validation, prepare
from esam_dist.engine import MicroBatches, build_engine
from esam_dist.errors import LossNotFiniteError, UserError
from esam_dist.evaluate import evaluate
from esam_dist.lock import locked
from esam_dist.metrics import Metrics, rewind
from esam_dist.network import build_network
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks, joined
from esam_dist.resume import check_network, choose, find_state
from esam_dist.run_folder import History, note_not_finite, open_run_folder, read_history
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.soundness import State
from esam_dist.train import Training, final_step, train

USER_ERROR = 2
STOPPED = 128 + signal.SIGTERM


def program() -> NoReturn:
    """`main` as a process of its own, which ends without taking the interpreter apart.

    A thread of gloo may let go of a tensor a moment after its process group is gone. If CPython is finalising then, C++
    calls `terminate`, and a rank whose work is done fails its job. Exit functions still run; output is written.
    """
    status: object = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 an error of the user's, 143 stopped by a signal after a checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    args = _parsed(argv)
    try:
        status = args.run(args) or 0
    except UserError as error:
        launch.mistake.say(error)
        status = USER_ERROR
    sys.exit(status)


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with changes of keys also behind an option, where argparse by itself expects none."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esam-dist", description="Sharpness-aware training of image classifiers.")
    parser.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher says it to every rank, beside the environment that we read.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("train", _train, "Train as CONFIG says: alone, or as one rank under torchrun or deepspeed."),
        ("config", _config, "Print the resolved configuration."),
    ):
        added = command(name, run, text)
        added.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file")
    added.add_argument("--check", action="store_true", help="only validate")
    added = command("evaluate", _evaluate, "Score a checkpoint of a run on its validation data.")
    added.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    added.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to its configuration")
    added.add_argument("--averaged", action="store_true", help="the averaged weights (train.average)")
    added.add_argument("--checkpoint", default="best", help="best (default), newest, or a path")
    prepare.add_arguments(command("prepare", prepare.run, "Write a dataset as indexed shards."))
    launch.add_arguments(command("launch", launch.run, "Start a job on one node, several nodes, Slurm or Kubernetes."))
    compare.add_arguments(
        command("compare", lambda args: compare.run(args, _catch_signals()), "Compare methods at equal time.")
    )
    report.add_arguments(command("report", report.run, "Write one HTML page about one or several runs."))
    return parser


def _config(args: argparse.Namespace) -> int:
    cfg = config.load(args.config, args.overrides)
    print("valid" if args.check else config.dump(cfg), end="\n" if args.check else "")
    return 0


def _train(args: argparse.Namespace) -> int:
    cfg = config.load(args.config, args.overrides)
    ranks = Ranks.from_environment()
    stop_requested = _catch_signals()
    launch.lifeline.hold()
    # All that the user can get wrong is found here, before the ranks meet.
    data = open_train(cfg.data, seed=cfg.run.seed, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
    validation = open_validation(cfg.data, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
    module = build_network(cfg, data.num_classes, ranks.device)
    with locked(cfg.run.folder, ranks) as check_owner:
        folder = open_run_folder(cfg, ranks)
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, check_owner)
        saved = find_state(cfg, checkpoints, module) if ranks.is_first else None
        progress = _progress(cfg, saved, read_history(folder), data) if ranks.is_first else None
        with (
            closing(_open_metrics(cfg, ranks, folder, progress)) as metrics,
            joined(cfg.engine.collective_timeout_seconds),
        ):
            batches = MicroBatches.of(cfg.data.batch_size, cfg.train, cfg.method)
            engine = build_engine(module, ranks, cfg.optim, cfg.engine, batches)
            trainer = SharpnessAware.over(engine, cfg.method, ranks, seed=cfg.run.seed)
            saved, progress = ranks.share((saved, progress))
            assert progress is not None
            metrics.take_up(progress)
            average = _average(cfg, module, progress)
            run = Training(cfg, trainer, data, validation, metrics, checkpoints, progress, stop_requested, average)
            run.has_begun = launch.lifeline.begun
            if saved is not None:
                _take_up(run, saved)
            del saved  # as large as all that is trained
            try:
                finished = train(run)
            except LossNotFiniteError:
                if ranks.is_first:
                    note_not_finite(folder)
                raise
            data.close()
    return 0 if finished else STOPPED


def _take_up(run: Training, saved: State) -> None:
    """Continue from what a checkpoint holds."""
    run.trainer.engine.load_state_dict(saved["engine"])
    run.trainer.state.load_state_dict(saved.get("method", {}))
    if run.average is not None:
        run.average.load_state_dict(saved.get("average", {}))


def _evaluate(args: argparse.Namespace) -> int:
    cfg = config.load(args.run_folder / "config.yaml", args.overrides)
    checkpoints = Checkpoints(args.run_folder / "checkpoints", cfg.checkpoint.keep)
    path, state = choose(checkpoints, args.checkpoint)
    ranks = Ranks.from_environment()
    validation = open_validation(cfg.data, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
    module = build_network(cfg, validation.num_classes, ranks.device)
    check_network(path, state, cfg, module)
    weights = state["engine"]["model"]
    if args.averaged:
        if not state.get("average"):
            raise UserError(
                f"checkpoint {path}: holds no average; train with train.average = ema, or leave out --averaged"
            )
        weights = averaged_model(weights, state["average"])
    module.load_state_dict(weights)
    del state, weights
    with joined(cfg.engine.collective_timeout_seconds) as ranks:
        score = evaluate(module, validation, ranks)
    if ranks.is_first:
        print(
            f"{path}: accuracy {score.accuracy:.4f}, top-5 {score.top5_accuracy:.4f}, loss {score.loss:.4f} "
            f"over {score.num_samples} samples"
        )
    return 0


def _progress(cfg: config.Config, saved: State | None, history: History, data: TrainData) -> Progress:
    """Where the run stands, in a process that begins now."""
    progress = Progress.of(saved["train"] if saved else None)
    world_size = Ranks.from_environment().world_size
    samples_per_step = cfg.data.batch_size * world_size * cfg.train.accumulate
    return replace(
        progress,
        planned_steps=final_step(cfg, progress, data.num_samples, samples_per_step),
        restarts=max(0, history.starts - 1),
        not_finite=history.not_finite,
    )


def _average(cfg: config.Config, module: nn.Module, progress: Progress) -> WeightAverage | None:
    """What `train.average` asks for."""
    train = cfg.train
    if train.average == "none":
        return None
    every = train.average_every or max(1, round(progress.planned_steps / train.epochs))
    return WeightAverage(module, train.average, decay=train.average_decay, last=train.average_last, every=every)


def _open_metrics(cfg: config.Config, ranks: Ranks, folder: Path, progress: Progress | None) -> Metrics:
    if progress is not None:
        rewind(folder, progress.step)
    run_info = {
        "version": __version__,
        "model": cfg.model.name,
        "method": cfg.method.name,
        "engine": cfg.engine.name,
        "precision": cfg.train.precision,
    }
    return Metrics(folder, cfg.metrics, ranks, run_info, progress)


def _catch_signals() -> Callable[[], bool]:
    """SIGTERM and the first Ctrl-C ask for an orderly stop; a second Ctrl-C ends the process."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return lambda: bool(received)
