"""`esam-dist compare STUDY`: declare, calibrate, tune, run, report; started again, it goes on where it was."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esam_dist.compare import calibrate, page, plan, statistics
from esam_dist.compare.plan import Cost, Planned, Setting, Variant
from esam_dist.compare.runs import Result, Runner, duration, result
from esam_dist.compare.study import Study, advice, dump, load
from esam_dist.config import load as load_config
from esam_dist.data.dataset import DESCRIPTION, read_description
from esam_dist.data.prepare.held_out import HeldOut
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.errors import UserError
from esam_dist.files import write_file
from esam_dist.lock import locked
from esam_dist.ranks import Ranks
from esam_dist.report.command import in_columns
from esam_dist.stop import Stop

log = logging.getLogger(__name__)

STUDY = "study.yaml"
TUNING_DATA = "tuning_data"
SMALL = 20_000
"""Images that are written sooner than processes are started for it."""


@dataclass(frozen=True)
class Outcome:
    """What is known of a study so far."""

    costs: dict[str, Cost]
    chosen: dict[str, Variant]
    """Of each method; empty until its values are chosen."""
    trials: list[Planned]
    runs: list[Planned]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist compare` on `parser`."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="YAML file, see docs/compare.md")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and how long it takes; write nothing")


def run(args: argparse.Namespace, stop: Stop) -> int:
    """Carry out a study, or go on with it. Raises UserError for what is wrong in its file, and for a run that fails.

    Returns 0 when all runs are finished, 143 or 130 when SIGTERM or Ctrl-C asked for a stop.
    """
    study = load(args.study)
    _refuse_another(study)
    plan.check(study)
    for line in advice(study):
        log.warning("%s", line)
    # What the start of this process took is what that of a run takes.
    runner = Runner(study, time.process_time(), stop)
    if args.dry_run:
        _print_plan(_planned(study, calibrate.costs(study, keep=False), {}), runner)
        return 0
    with locked(study.folder, Ranks()):
        _declare(study)
        outcome = _planned(study, calibrate.costs(study, keep=True), {})
        _print_plan(outcome, runner)
        try:
            finished = not study.is_tuned or _carry_out_trials(study, outcome, runner)
            if finished and study.is_tuned:
                outcome = _planned(study, outcome.costs, statistics.choose(study, _results(study, outcome.trials)))
                log.info("chosen: %s", "; ".join(variant.name for variant in outcome.chosen.values()))
            finished = finished and runner.carry_out(outcome.runs)
        finally:
            _report(study, outcome)
    return 0 if finished else stop.status


def _refuse_another(study: Study) -> None:
    """Raise UserError where the folder holds a study that declared something else."""
    path = study.folder / STUDY
    if not path.exists():
        return
    before, now = load(path).model_dump(mode="json"), study.model_dump(mode="json")
    for key in now:
        if key != "jobs" and before[key] != now[key]:
            raise UserError(f"{key}: {path} declared another value before the runs; choose another folder")
    copy = study.folder / plan.BASE
    if copy.exists() and study.base.exists() and copy.read_bytes() != study.base.read_bytes():
        raise UserError(f"base = {study.base}: has changed since {copy} was written; choose another folder")


def _declare(study: Study) -> None:
    """Write down what will be done, before it is."""
    try:
        if not (study.folder / STUDY).exists():
            write_file(study.folder / plan.BASE, study.base.read_bytes())
            write_file(study.folder / STUDY, dump(study))
    except OSError as error:
        raise UserError(f"folder = {study.folder}: cannot be written ({error.strerror}); choose another") from None


def _planned(study: Study, costs: dict[str, Cost], chosen: dict[str, int]) -> Outcome:
    """All runs; until values are chosen, with the first ones of each grid."""
    every = plan.variants(study)
    variants = {method: trials[chosen.get(method, 0)] for method, trials in every.items()}
    first = load_config(plan.base_of(study), plan.words(study.overrides))
    stream, root = first.data.stream, first.data.path
    samples = first.data.stream_samples if stream else read_description(root).splits["train"].samples
    runs = list(plan.runs(study, variants, costs, Setting(samples, {})))
    trials = []
    if study.is_tuned:
        held_out = len(HeldOut(root, study.tuning.share).labels["train"])
        setting = Setting(held_out, {"data.path": str(study.folder / TUNING_DATA)})
        trials = list(plan.trials(study, costs, setting))
    return Outcome(costs, variants if chosen or not trials else {}, trials, runs)


def _carry_out_trials(study: Study, outcome: Outcome, runner: Runner) -> bool:
    """Score the values of grids on images that are held out of the training set; False when stopped."""
    out = study.folder / TUNING_DATA
    if not (out / DESCRIPTION).exists():
        root = load_config(plan.base_of(study), plan.words(study.overrides)).data.path
        source = HeldOut(root, study.tuning.share)
        is_small = len(source.labels["train"]) < SMALL
        write_dataset(source, out, Plan(), workers=0 if is_small else os.cpu_count() or 1)
    return runner.carry_out(outcome.trials, later=runner.predicted(outcome.runs))


def _results(study: Study, runs: Sequence[Planned]) -> list[Result]:
    return [found for run in runs if (found := result(run, study.accuracy))]


def _report(study: Study, outcome: Outcome) -> None:
    found, trials = _results(study, outcome.runs), _results(study, outcome.trials)
    write_file(study.folder / "results.csv", page.results_csv(found))
    write_file(study.folder / "report.html", page.page(study, found, trials, outcome.chosen, outcome.costs))
    for table in (page.summary(study, found), page.differences(study, found), page.targets(study, found)):
        if len(table) > 1:
            print(in_columns(table), end="\n\n")  # noqa: T201
    print(f"{len(found)} of {len(outcome.runs)} runs; written to {study.folder / 'report.html'}")  # noqa: T201


def _print_plan(outcome: Outcome, runner: Runner) -> None:
    table: Counter[tuple[str, ...]] = Counter()
    for run in [*outcome.trials, *outcome.runs]:
        name = f"{run.variant.name}, trial" if run in outcome.trials else run.variant.method
        epochs, used = f"{run.epochs:.4g}", f"{run.budget_used:.1%}"
        table[name, f"{run.budget:g}", epochs, str(run.updates), used, duration(run.seconds)] += 1
    header = ["Method", "Budget", "Epochs", "Updates", "Budget used", "Time of a run", "Runs"]
    print(in_columns([header, *([*row, str(count)] for row, count in table.items())]))  # noqa: T201
    total = runner.predicted([*outcome.trials, *outcome.runs])
    told = f"{len(outcome.trials)} trials and {len(outcome.runs)} runs"
    print(f"{told}: about {duration(total)}, without validations")  # noqa: T201
