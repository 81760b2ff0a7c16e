"""Every sink of one rank behind one object: the loop reports once, this passes it on."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

from prometheus_client import CollectorRegistry

from esam_dist import config
from esam_dist.metrics import jsonl
from esam_dist.metrics.board import TensorBoard
from esam_dist.metrics.console import Bar, Lines, wants_bar
from esam_dist.metrics.health import Pulse, Server
from esam_dist.metrics.prometheus import Exposition
from esam_dist.metrics.rows import Standing, TrainRow, ValidationRow

log = logging.getLogger("esam_dist")

PUSHED_JOB = "esam_pushed"
"""The label `job` of pushed values, by which rules leave them out: a gateway shows them for ever."""


class Metrics:
    """Every sink of one rank: Prometheus on each rank; metrics.jsonl, TensorBoard and the console on rank 0.

    `standing` is where the run stands; ranks other than 0 get to know it when they have met, and then call `take_up`.
    Raises UserError when the endpoint's address is taken or TensorBoard is missing.
    """

    def __init__(
        self,
        folder: Path,
        cfg: config.Metrics,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        run_info: dict[str, str],
        standing: Standing | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._cfg, self._rank, self._restarts = cfg, rank, 0
        self._run = run_info.get("run", folder.name)
        self._prometheus = Exposition(self.registry, rank=rank, world_size=world_size, run_info=run_info)
        self._prometheus.set("esam_start_timestamp_seconds", time.time())
        if standing is not None:
            self.take_up(standing)
        self.pulse = Pulse(cfg.stall_seconds)
        self._server = Server(self.registry, self.pulse, cfg.bind, cfg.port + local_rank) if cfg.port else None
        self._board = TensorBoard(folder) if cfg.tensorboard and rank == 0 else None
        self._lines = jsonl.JsonLines(folder) if rank == 0 else None
        self._console: Bar | Lines | None = None
        if rank == 0 and standing is not None:
            total = standing.planned_steps
            self._console = Bar(total) if wants_bar(cfg.progress) else Lines(total)

    def take_up(self, standing: Standing) -> None:
        """Show where the run stands, before the first update of this process."""
        self._restarts = standing.restarts
        self._prometheus.take_up(standing)

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
        """Say that something other than an update moved on, such as a validation batch, so that it is no stall."""
        self.pulse.beat()

    def checkpoint_saved(self, step: int, seconds: float) -> None:
        """Report a checkpoint that is complete; every rank calls it."""
        self.pulse.beat()
        self._prometheus.set("esam_checkpoint_last_step", step)
        self._prometheus.set("esam_checkpoint_last_success_timestamp_seconds", time.time())
        self._prometheus.observe("checkpoint", seconds)
        self._write("checkpoint", {"step": step, "seconds": seconds})
        if self._console:
            self._console.checkpoint(step, seconds)

    def checkpoint_failed(self, step: int) -> None:
        """Report that the checkpoint of `step` could not be written; every rank calls it."""
        self.pulse.beat()
        self._prometheus.checkpoint_failed()
        self._write("checkpoint_failed", {"step": step})

    def close(self) -> None:
        """Push the final values where `metrics.gateway` says so, and close every sink, whatever another one raises."""
        with ExitStack() as stack:
            for sink in (self._server, self._console, self._board, self._lines):
                if sink:
                    stack.callback(sink.close)
            self._lines = self._board = self._console = self._server = None
            if self._cfg.gateway:
                self._push(self._cfg.gateway)

    def _write(self, kind: str, values: dict[str, object]) -> None:
        if self._lines:
            self._lines.write(kind, values)
        if self._board:
            self._board.write(kind, values)

    def _push(self, gateway: str) -> None:
        from prometheus_client import push_to_gateway

        group = {"run": self._run, "rank": str(self._rank)}
        try:
            push_to_gateway(gateway, job=PUSHED_JOB, grouping_key=group, registry=self.registry, timeout=10)
        except (OSError, HTTPException, ValueError) as error:
            # A run that trained for days does not fail because nobody listens.
            log.warning("metrics.gateway = %s: the final values were not taken (%s)", gateway, error)
