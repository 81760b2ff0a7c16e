"""One job under faults: supervised as a cluster does it, hurt as its schedule says, watched until it recovers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.chaos.agents import Agents
from benchmarks.chaos.configurations import Configuration
from benchmarks.chaos.history import Position, position
from benchmarks.chaos.place import Place
from benchmarks.chaos.schedule import KINDS, Fault

POLL_SECONDS = 0.05
STALL_SECONDS = 420.0
"""Without a new update for so long, the job hangs."""
PATIENCE_SECONDS = 150.0
"""Where one host's agent has failed and no update follows for so long, all hosts are started anew.

As cluster managers do it. torch alone does not: an agent whose ranks are done waits 300 s for the others, and one that
comes anew meets it no more."""
UNHURT_UPDATES = 8
"""A job that makes so many updates in the same process was not hurt, such as by the loss of an idle loader."""
FIRES_WITHIN_SECONDS = 60.0
"""A fault that waits for its place in the program (a save, a validation) and does not meet it is given up."""


@dataclass
class Struck:
    """A fault that came about, and what it cost."""

    fault: Fault
    seconds: float
    """Since the job began."""
    high: int
    """The furthest update that the job had reached."""
    who: str
    """The process of rank 0 then."""
    note: str = ""
    lost_seconds: float = 0.0
    """Until it was further than ever, beyond the time that the updates in between take."""
    replayed_steps: int = 0
    survived: bool = False
    is_over: bool = True
    """Whether what was done to it was undone again."""


class Pace(NamedTuple):
    """How fast the undisturbed run of a configuration is."""

    steps: int
    step_seconds: float


@dataclass
class Supervised:
    """A job and all that a fault may be done to."""

    configuration: Configuration
    place: Place
    agents: Agents
    pace: Pace
    struck: list[Struck] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    high: int = 0
    where: Position | None = None
    started_anew: int = 0
    """How often all hosts were, as one had failed."""

    def __post_init__(self) -> None:
        self.begun = self._moved = time.monotonic()
        self._first: float | None = None

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.monotonic() - self.begun

    @property
    def training_seconds(self) -> float:
        """From the first update to the last that was seen to begin."""
        return self._moved - (self._first or self._moved)

    @property
    def open(self) -> list[Struck]:
        """The faults that the job has not recovered from, oldest first."""
        return [struck for struck in self.struck if not struck.survived]

    def watch(self) -> None:
        """Start again what ended, and see how far the job is."""
        self.agents.tend()
        self.where = position(self.place.control, self.configuration.samples_per_step) or self.where
        if self.where is not None and self.where.step > self.high:
            self.high, self._moved = self.where.step, time.monotonic()
            self._first = self._first or self._moved
        if self.agents.are_done:
            self.high = self.pace.steps + 1
        still = time.monotonic() - self._moved
        if self.agents.failed_since(self._moved) and still > PATIENCE_SECONDS:
            self.agents.kill()
            self.started_anew += 1
        if still > STALL_SECONDS:
            self.troubles.append(f"no progress for {STALL_SECONDS:.0f} s at update {self.high}")
            self.agents.kill()
            self._moved = time.monotonic()
        self._close()

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Watch for so long, or until the condition holds; whether it did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch()
            if until():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def strike(self, fault: Fault, note: str = "", *, is_over: bool = True) -> Struck:
        """Take note of a fault that came about now."""
        who = self.where.who if self.where else ""
        self.struck.append(Struck(fault, self.seconds, self.high, who, note, is_over=is_over))
        return self.struck[-1]

    def undone(self, struck: Struck, note: str = "") -> bool:
        """Take note that what was done to the job is undone; from now on it recovers."""
        struck.high, struck.is_over, struck.note = self.high, True, note
        return True

    def _is_past(self, struck: Struck) -> bool:
        if self.agents.are_done:
            return True
        if not struck.is_over or self.where is None or self.where.step <= struck.high:
            return False
        # Ranks that are about to end still make updates; only where nobody missed a loader do they go on and on.
        again = self.where.who != struck.who or not KINDS[struck.fault.kind].restarts
        unhurt = struck.fault.kind == "kill_worker" and self.where.step > struck.high + UNHURT_UPDATES
        return again or unhurt

    def _close(self) -> None:
        """The faults that the job has left behind: it is further than it was before the latest."""
        open_now = self.open
        if not open_now or not self._is_past(open_now[-1]):
            return
        now = self.seconds
        ends = [struck.seconds for struck in open_now[1:]] + [now]
        for struck, end in zip(open_now, ends, strict=True):
            struck.lost_seconds, struck.survived = end - struck.seconds, True
        last = open_now[-1]
        last.lost_seconds = max(0.0, last.lost_seconds - (self.high - last.high) * self.pace.step_seconds)
        if KINDS[last.fault.kind].restarts and self.where is not None:
            last.replayed_steps = max(0, last.high - self.where.start)


def run(job: Supervised, faults: list[Fault], inject: Callable[[Supervised, Fault], bool]) -> None:
    """Run a job to its end; `inject` does a fault, and says whether it came about."""
    waiting = list(faults)
    job.agents.start()
    try:
        while not job.agents.are_done and len(job.troubles) < 3:
            job.watch()
            if waiting and not job.agents.are_done and _is_due(job, waiting[0]):
                inject(job, waiting.pop(0))
            else:
                time.sleep(POLL_SECONDS)
        job.watch()
    finally:
        if not job.agents.are_done:
            job.agents.kill()


def _is_due(job: Supervised, fault: Fault) -> bool:
    if fault.kind == "restart":
        # In the wake of the fault before. Where that did not come about, or is over already, it hits a running job.
        before = job.struck[-1] if job.struck else None
        wake = before is not None and not before.survived and KINDS[before.fault.kind].restarts
        return not job.open or (wake and before is not None and job.seconds >= before.seconds + fault.amount)
    return not job.open and job.where is not None and job.where.step >= fault.at_step
