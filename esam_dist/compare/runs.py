"""Runs as processes of the ordinary command line: those that are finished are kept, those that are not go on."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esam_dist.compare.calibrate import threads_of_a_run
from esam_dist.compare.plan import Planned, base_of
from esam_dist.compare.study import Study
from esam_dist.errors import UserError
from esam_dist.metrics import jsonl
from esam_dist.run_folder import read_history

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LOG = "log.txt"


@dataclass(frozen=True)
class Result:
    """What a run came to: accuracies after its last update, nan where its loss was not finite."""

    run: Planned
    raw: float
    averaged: float | None
    curve: list[tuple[float, float]]
    """(seconds as calibrated, accuracy that the study compares) of each validation."""

    @property
    def diverged(self) -> bool:
        """Whether it ended because its loss was not finite."""
        return math.isnan(self.raw)

    def accuracy(self, which: str) -> float:
        """The one that the study compares."""
        return self.raw if which == "raw" or self.averaged is None else self.averaged


def result(run: Planned, which: str) -> Result | None:
    """What is in the folder of a run; None while it is not finished."""
    rows = [row for row in jsonl.read(run.folder) if row["kind"] == "validation"]
    key = "accuracy" if which == "raw" else "averaged_accuracy"
    curve = [(row["step"] / run.updates * run.seconds, row[key]) for row in rows if row.get(key) is not None]
    if rows and rows[-1]["step"] == run.updates:
        return Result(run, rows[-1]["accuracy"], rows[-1].get("averaged_accuracy"), curve)
    if read_history(run.folder).not_finite:
        return Result(run, math.nan, None, curve)
    return None


class Runner:
    """Carries out runs, as many at a time as the study says, and tells how long all of them still take."""

    def __init__(self, study: Study, start_seconds: float, stop_requested: Callable[[], bool]) -> None:
        self._study, self._start_seconds, self._stop_requested = study, start_seconds, stop_requested
        self._left, self._taken, self._foreseen = 0.0, 0.0, 0.0
        self._running: dict[subprocess.Popen[bytes], tuple[Planned, float]] = {}

    def predicted(self, runs: Sequence[Planned]) -> float:
        """Seconds of `runs`, as calibrated, without validations."""
        return sum(run.seconds + self._start_seconds for run in runs) / self._study.jobs

    def carry_out(self, runs: Sequence[Planned], later: float = 0.0) -> bool:
        """Finish `runs`, in their order; False when a stop was asked for, which leaves checkpoints.

        `later`: predicted seconds of what comes behind them. Raises UserError when a run fails, other than by a loss
        that is not finite; those beside it are stopped in order.
        """
        waiting = [run for run in runs if result(run, self._study.accuracy) is None]
        if len(waiting) < len(runs):
            log.info("%d of %d runs are finished already", len(runs) - len(waiting), len(runs))
        self._left = self.predicted(waiting) + later
        count = len(waiting)
        try:
            while (waiting or self._running) and not self._stop_requested():
                while waiting and len(self._running) < self._study.jobs:
                    self._start(waiting.pop(0))
                time.sleep(POLL_SECONDS)
                for process in [process for process in self._running if process.poll() is not None]:
                    self._end(process, count - len(waiting) - len(self._running) + 1, count)
        finally:
            self._stop()
        return not waiting and all(result(run, self._study.accuracy) for run in runs)

    def _start(self, run: Planned) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "esam_dist"]
        # As under a launcher of one rank: a run then ends with us, also when we are killed.
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        if self._study.ranks > 1:
            nodes = ["--standalone", "--nproc-per-node", str(self._study.ranks)]
            launcher = [sys.executable, "-m", "torch.distributed.run", *nodes, "-m", "esam_dist"]
            environment = {}
        environment["OMP_NUM_THREADS"] = str(threads_of_a_run(self._study))
        command = [*launcher, "train", str(base_of(self._study)), *run.overrides]
        with (run.folder / LOG).open("ab") as output:
            process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us to pass on, once
            )
        self._running[process] = run, time.monotonic()

    def _end(self, process: subprocess.Popen[bytes], number: int, count: int) -> None:
        run, began = self._running.pop(process)
        found = result(run, self._study.accuracy)
        if found is None:
            raise UserError(
                f"{run.name}: ended with status {process.returncode}; see {run.folder / LOG}, and start the study "
                "again to go on"
            )
        # How much longer runs take than was predicted: validations, and others at work.
        self._taken += (time.monotonic() - began) / self._study.jobs
        self._foreseen += self.predicted([run])
        self._left -= self.predicted([run])
        told = "its loss was not finite" if found.diverged else f"accuracy {found.accuracy(self._study.accuracy):.4f}"
        left = duration(self._taken / self._foreseen * max(0.0, self._left))
        log.info("%d of %d: %s: %s; %s left in all", number, count, run.name, told, left)

    def _stop(self) -> None:
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        for process in self._running:
            process.wait()
        self._running.clear()


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
