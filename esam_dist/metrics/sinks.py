"""Every sink of one rank behind one object: the loop reports once, and this passes it on."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

from prometheus_client import CollectorRegistry

from esam_dist.metrics import jsonl
from esam_dist.metrics.board import TensorBoard
from esam_dist.metrics.console import LogLines, ProgressBar, wants_bar
from esam_dist.metrics.health import Pulse, Server
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.metrics.prometheus import Exposition
from esam_dist.metrics.rows import TrainRow, ValidationRow
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks

log = logging.getLogger("esam_dist")

PUSHED_JOB = "esam_pushed"
"""The label `job` of pushed values. Rules leave it out, because a gateway shows pushed values for ever."""


class Metrics:
    """Every sink of one rank: Prometheus on each rank; metrics.jsonl, TensorBoard and the console on rank 0.

    `progress` is where the run stands. Other ranks than 0 learn it when the ranks have met, and then call `take_up`.
    Raises UserError when the endpoint's address is taken or TensorBoard is missing.
    """

    def __init__(
        self, folder: Path, cfg: MetricsKeys, ranks: Ranks, run_info: dict[str, str], progress: Progress | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        self._cfg, self._rank, self._restarts = cfg, ranks.rank, 0
        self._run = run_info.get("run", folder.name)
        self._prometheus = Exposition(self.registry, rank=ranks.rank, world_size=ranks.world_size, run_info=run_info)
        self._prometheus.set("esam_start_timestamp_seconds", time.time())
        if progress is not None:
            self.take_up(progress)
        self.pulse = Pulse(cfg.stall_seconds)
        self._server = Server(self.registry, self.pulse, cfg.bind, cfg.port + ranks.local_rank) if cfg.port else None
        self._board = TensorBoard(folder) if cfg.tensorboard and ranks.is_first else None
        self._rows = jsonl.JsonLines(folder) if ranks.is_first else None
        self._console: ProgressBar | LogLines | None = None
        if ranks.is_first and progress is not None:
            total = progress.planned_steps
            self._console = ProgressBar(total) if wants_bar(cfg.progress) else LogLines(total)

    def take_up(self, progress: Progress) -> None:
        """Show where the run stands, before the first update of this process."""
        self._restarts = progress.restarts
        self._prometheus.take_up(progress)

    def train(self, row: TrainRow) -> None:
        """Report one log interval; every rank calls it."""
        self.pulse.stepped(row.step)
        self._prometheus.train(row)
        self._write("train", jsonl.train_values(row) | {"restarts": self._restarts, "time": time.time()})
        if self._console:
            self._console.train(row)

    def validation(self, row: ValidationRow) -> None:
        """Report one validation; every rank calls it."""
        self.pulse.beat()
        self._prometheus.validation(row)
        self._write("validation", jsonl.validation_values(row))
        if self._console:
            self._console.validation(row)

    def progress(self, steps: int) -> None:
        """Report that `steps` updates of the run are finished (not: how many more); cheap enough for every update."""
        self.pulse.stepped(steps)
        self._prometheus.set("esam_step", steps)
        self._prometheus.set("esam_last_step_timestamp_seconds", time.time())
        if self._console:
            self._console.progress(steps)

    def heartbeat(self) -> None:
        """Report progress other than an update, such as a validation batch, so that it does not count as a stall."""
        self.pulse.beat()

    def checkpoint_begun(self, seconds: float) -> None:
        """Report how long training stood still for a checkpoint; every rank calls it."""
        self.pulse.beat()
        self._prometheus.observe("checkpoint", seconds)

    def checkpoint_saved(self, step: int, seconds: float) -> None:
        """Report a checkpoint that is complete, and was written in so many seconds; every rank calls it."""
        self.pulse.beat()
        self._prometheus.set("esam_checkpoint_last_step", step)
        self._prometheus.set("esam_checkpoint_last_success_timestamp_seconds", time.time())
        self._write("checkpoint", {"step": step, "seconds": seconds})
        if self._console:
            self._console.checkpoint(step, seconds)

    def not_finite(self) -> None:
        """Report that the run ends because the loss, or too many gradients in a row, were not finite."""
        self._prometheus.not_finite()

    def checkpoint_failed(self, step: int) -> None:
        """Report that the checkpoint of `step` could not be written; every rank calls it."""
        self.pulse.beat()
        self._prometheus.checkpoint_failed()
        self._write("checkpoint_failed", {"step": step})

    def close(self) -> None:
        """Push the final values to `metrics.gateway`, if set, and close every sink, whatever another one raises."""
        with ExitStack() as stack:
            for sink in (self._server, self._console, self._board, self._rows):
                if sink:
                    stack.callback(sink.close)
            self._rows = self._board = self._console = self._server = None
            if self._cfg.gateway:
                self._push(self._cfg.gateway)

    def _write(self, kind: str, values: dict[str, object]) -> None:
        if self._rows:
            self._rows.write(kind, values)
        if self._board:
            self._board.write(kind, values)

    def _push(self, gateway: str) -> None:
        from prometheus_client import push_to_gateway

        group = {"run": self._run, "rank": str(self._rank)}
        try:
            push_to_gateway(gateway, job=PUSHED_JOB, grouping_key=group, registry=self.registry, timeout=10)
        except (OSError, HTTPException, ValueError) as error:
            # A run that trained for days must not fail because no gateway listens.
            log.warning("metrics.gateway = %s: the final values were not taken (%s)", gateway, error)
