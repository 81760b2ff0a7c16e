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
from typing import NoReturn

from torch import nn

from esam_dist import (
    __version__,
    announcements,
    compare,
    config,
    doctor,
    evaluation,
    guide,
    launch,
    pretrained,
    report,
    sharpness,
    ship,
)
from esam_dist.averaging import WeightAverage
from esam_dist.checkpoint import Checkpoints
from esam_dist.data import TrainData, open_train, open_validation, prepare
from esam_dist.engine import MicroBatches, build_engine
from esam_dist.errors import LossNotFiniteError, UserError
from esam_dist.fingerprint import Replicas
from esam_dist.lock import locked
from esam_dist.metrics import Metrics, rewind
from esam_dist.network import build_network, prepare_training
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks, joined
from esam_dist.resume import find_state
from esam_dist.run_folder import History, describe, note_not_finite, open_run_folder, read_before, read_history
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.soundness import State
from esam_dist.stop import Stop
from esam_dist.train import Training, final_step, train
from esam_dist.watchdog import watching

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT

logger = logging.getLogger(__name__)


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
    """Run one command and exit: 0 done, 2 an error of the user's, 143 or 130 stopped by SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        args = _parsed(argv)
        status = args.run(args) or 0
    except UserError as error:
        launch.mistake.say(error)
        status = USER_ERROR
    except KeyboardInterrupt:
        print("esam-dist: interrupted", file=sys.stderr)
        status = INTERRUPTED
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
        config.add_config_help(added)
    added.add_argument("--check", action="store_true", help="only validate, with the data if it is there")
    added = command("evaluate", evaluation.run, "Score a checkpoint, and say what it gets wrong.")
    evaluation.add_arguments(added)
    config.add_config_help(added)
    prepare.add_arguments(command("prepare", prepare.run, "Write a dataset as indexed shards."))
    added = command("launch", launch.run, "Start a job on one node, several nodes, Slurm or Kubernetes.")
    launch.add_arguments(added)
    config.add_config_help(added)
    ship.export.add_arguments(command("export", ship.export.run, "Write the weights of a run as a file for others."))
    ship.predict.add_arguments(command("predict", ship.predict.run, "Say what images show."))
    compare.add_arguments(
        command("compare", lambda args: compare.run(args, Stop.on_signals()), "Compare methods at equal time.")
    )
    sharpness.add_arguments(command("sharpness", sharpness.run, "Measure how flat the loss is around checkpoints."))
    report.add_arguments(command("report", report.run, "Write one HTML page about one or several runs."))
    guide.init.add_arguments(command("init", guide.init.run, "Write a config for a prepared folder, which trains."))
    guide.recipes.add_arguments(command("recipes", guide.recipes.run, "List the configs that come along, or print one"))
    guide.models.add_arguments(command("models", guide.models.run, "List the networks that model.name takes."))
    guide.completion.add_arguments(
        command("completion", lambda args: guide.completion.run(args, _parser), "Print a shell's completion script.")
    )
    doctor.add_arguments(command("doctor", doctor.run, "Check this machine: one table, with remedies."))
    return parser


def _config(args: argparse.Namespace) -> int:
    cfg = config.load(args.config, args.overrides)
    print(guide.validity.told(cfg) if args.check else config.dump(cfg), end="\n" if args.check else "")
    return 0


def _train(args: argparse.Namespace) -> int:
    cfg = config.load(args.config, args.overrides)
    ranks = Ranks.from_environment()
    stop = Stop.on_signals()
    launch.lifeline.hold()
    # All that the user can get wrong is found here, before the ranks meet.
    data = open_train(cfg.data, seed=cfg.run.seed, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
    validation = open_validation(cfg.data, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
    module = build_network(cfg, data.num_classes, ranks.device)
    prepare_training(cfg, module, ranks)
    card = ship.describe(cfg, cfg.model.num_classes or data.num_classes)
    with locked(cfg.run.folder, ranks) as check_owner:
        folder = open_run_folder(cfg, ranks)
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, check_owner)
        saved = find_state(cfg, checkpoints, module) if ranks.is_first else None
        if cfg.model.weights and ranks.is_first and saved is None:
            pretrained.begin(cfg, module.network)
        progress = _progress(cfg, saved, read_history(folder), data) if ranks.is_first else None
        if progress is not None:
            _announce(cfg, ranks, module, data, progress)
        with (
            closing(_open_metrics(cfg, ranks, folder, progress)) as metrics,
            watching(folder, ranks, cfg.engine.collective_timeout_seconds) as dog,
            joined(cfg.engine.collective_timeout_seconds),
        ):
            if cfg.model.weights:
                ranks.take_from_first(module)
            dog.signs.append(lambda: metrics.pulse.latest)
            batches = MicroBatches.of(cfg.data.batch_size, cfg.train, cfg.method)
            engine = build_engine(module, ranks, cfg.optim, cfg.engine, batches)
            trainer = SharpnessAware.over(engine, cfg.method, ranks, seed=cfg.run.seed)
            dog.signs.append(lambda: trainer.clock.latest)
            saved, progress = ranks.share((saved, progress))
            assert progress is not None
            metrics.take_up(progress)
            average = _average(cfg, module, progress)
            parts = (data, validation, metrics, checkpoints, progress, stop, average)
            run = Training(cfg, trainer, *parts, card=card.model_dump(), has_begun=launch.lifeline.begun)
            run.replicas = Replicas(ranks, cfg.train.check_replicas_every)
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
        if ranks.is_first and run.progress.step:
            ended = announcements.finished if finished else announcements.stopped
            logger.info("%s", ended(cfg, checkpoints, run.progress, stop))
    return 0 if finished else stop.status


def _announce(cfg: config.Config, ranks: Ranks, module: nn.Module, data: TrainData, progress: Progress) -> None:
    """Say what is about to happen, and write it down, if anything is."""
    before = read_before(cfg.run.folder) if progress.step else None
    if before is not None and progress.step >= progress.planned_steps:
        if idle := announcements.without_effect(before, cfg):
            logger.warning("%s", idle)
        return
    for change in [] if before is None else announcements.changes(before, cfg, ranks, progress, data.num_samples):
        logger.warning("%s", change)
    logger.info("%s", announcements.opening(cfg, ranks, module, data, progress))
    describe(cfg, ranks)


def _take_up(run: Training, saved: State) -> None:
    """Continue from what a checkpoint holds."""
    run.trainer.engine.load_state_dict(saved["engine"])
    run.trainer.state.load_state_dict(saved.get("method", {}))
    if run.average is not None:
        run.average.load_state_dict(saved.get("average", {}))


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
