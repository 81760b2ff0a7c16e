"""The launchers of a job, one a host: started, started again where they ended, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.chaos.configurations import Configuration
from benchmarks.chaos.place import Network, Place
from benchmarks.processes import MARK, Process, of_job

ROOT = Path(__file__).resolve().parents[2]
INJECT = Path(__file__).parent / "inject"
PORT = 29500
GRACE_SECONDS = 8
"""How long the agent waits for ranks that it ends: after that a stopped one is killed."""


class Agents:
    """`esam-dist launch` on every host of `place`, with as many restarts as it takes."""

    def __init__(self, configuration: Configuration, place: Place, config: Path, mark: str) -> None:
        self._configuration, self._place, self._config, self._mark = configuration, place, config, mark
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._finished: dict[int, float] = {}
        self.starts = 0
        self._failed = float("-inf")
        self.statuses: list[int] = []
        """Of those that ended, but for 0."""

    def start(self) -> None:
        """Start the agent of every host that has none."""
        for host in range(self._configuration.hosts):
            if host not in self._running and host not in self._finished:
                with (self._place.root / "log").open("ab") as log:
                    words = self._place.entered(host, self._words(host))
                    self._running[host] = subprocess.Popen(words, env=self._environment(), stdout=log, stderr=log)
                self.starts += 1

    def tend(self) -> None:
        """Start again what ended, unless it ended well. One that ended well is needed again where another did not."""
        for host, process in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            del self._running[host]
            if status == 0:
                self._finished[host] = time.monotonic()
            else:
                self.statuses.append(status)
                self._failed = time.monotonic()
                self._finished.clear()
        self.start()

    @property
    def are_done(self) -> bool:
        """Whether all hosts ended well."""
        return len(self._finished) == self._configuration.hosts

    def failed_since(self, when: float) -> bool:
        """Whether one of several hosts has failed since then, and none were all started anew."""
        return self._configuration.hosts > 1 and self._failed > when

    def processes(self, role: str) -> list[Process]:
        """The living processes of a role."""
        return [process for process in of_job(self._mark) if process.role == role]

    def ranks(self) -> dict[int, int]:
        """The processes of the living ranks, by rank."""
        return {process.rank: process.pid for process in self.processes("rank") if process.rank is not None}

    def pid(self, host: int) -> int | None:
        """The agent's process on that host."""
        process = self._running.get(host % self._configuration.hosts)
        return process.pid if process is not None and process.poll() is None else None

    def terminate(self) -> None:
        """Ask for an orderly stop, as a cluster does that takes the hosts away."""
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all that belongs to the job, at once."""
        for process in of_job(self._mark):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for running in self._running.values():
            running.kill()
            running.wait()
        self._running.clear()
        self._finished.clear()
        self._failed = float("-inf")

    def _words(self, host: int) -> list[str]:
        configuration = self._configuration
        words = [sys.executable, "-m", "esam_dist", "launch", str(self._config), "--no-checks", "--max-restarts=100000"]
        words += [f"--grace={GRACE_SECONDS}", f"--logs={self._place.logs}"]
        if configuration.hosts == 1:
            return [*words, f"--nproc-per-node={configuration.ranks}"]
        words += [f"--nproc-per-node={configuration.ranks // configuration.hosts}", f"--nnodes={configuration.hosts}"]
        words += [f"--node-rank={host}", f"--local-addr={Network.address(host)}"]
        return [*words, f"--rendezvous={Network.address(0)}:{PORT}"]

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        settings = {
            "PATH": path,
            "PYTHONPATH": os.pathsep.join([str(INJECT), str(ROOT)]),
            "ESAM_CHAOS": str(self._place.control),
            "TMPDIR": str(self._place.temporary),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            MARK: self._mark,
        }
        if self._configuration.hosts > 1:
            settings["GLOO_SOCKET_IFNAME"] = "eth0"
        return os.environ | settings
