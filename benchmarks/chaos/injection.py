"""How each kind of fault is done to a job, and undone where it is one that passes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from benchmarks.chaos.configurations import COLLECTIVE_SECONDS
from benchmarks.chaos.job import FIRES_WITHIN_SECONDS, Supervised
from benchmarks.chaos.schedule import Fault

GONE_SECONDS = 10.0
"""Ranks whose agent was killed must be gone by then."""
WINDOW_SECONDS = 4.0
"""For how long a disk is slow, or a clock wrong."""


def inject(job: Supervised, fault: Fault) -> bool:
    """Do `fault` to `job`; False where it did not come about."""
    if fault.kind in ("write", "rename", "prune", "validation"):
        return _within(job, fault)
    return INJECTIONS[fault.kind](job, fault)


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_rank(job: Supervised, fault: Fault) -> bool:
    pid = job.agents.ranks().get(fault.rank)
    if pid is None:
        return False
    _kill(pid)
    job.strike(fault)
    return True


def _kill_all(job: Supervised, fault: Fault) -> bool:
    pids = list(job.agents.ranks().values())
    for pid in pids:
        _kill(pid)
    if pids:
        job.strike(fault)
    return bool(pids)


def _kill_agent(job: Supervised, fault: Fault) -> bool:
    agent = job.agents.pid(fault.rank)
    if agent is None:
        return False
    orphans = {pid for pid in job.agents.ranks().values() if _parent(pid) == agent}
    struck = job.strike(fault)
    _kill(agent)
    begun = time.monotonic()
    # Not tended meanwhile: who starts it again at once would not see whether they end by themselves.
    while orphans & set(job.agents.ranks().values()) and time.monotonic() < begun + 3 * GONE_SECONDS:
        time.sleep(0.1)
    left, seconds = orphans & set(job.agents.ranks().values()), time.monotonic() - begun
    struck.note = f"agent killed, {len(orphans)} ranks gone after {seconds:.1f} s"
    if left or seconds > GONE_SECONDS:
        job.troubles.append(f"fault {fault.number}: {len(orphans)} ranks outlived their agent by {seconds:.1f} s")
        for pid in left:
            _kill(pid)
    return True


def _kill_worker(job: Supervised, fault: Fault) -> bool:
    workers = [process.pid for process in job.agents.processes("worker") if process.rank == fault.rank]
    if not workers:
        return False
    _kill(workers[int(fault.amount * len(workers)) % len(workers)])
    job.strike(fault)
    # Where it had nothing more to do nobody misses it; then the job just goes on.
    return True


def _term(job: Supervised, fault: Fault) -> bool:
    before = len(job.agents.statuses)
    struck = job.strike(fault)
    job.agents.terminate()
    job.wait(30.0, lambda: len(job.agents.statuses) > before)
    struck.note = f"exit status {', '.join(map(str, job.agents.statuses[before:])) or 'none in 30 s'}"
    return True


def _stop(job: Supervised, fault: Fault) -> bool:
    pid = job.agents.ranks().get(fault.rank)
    if pid is None:
        return False
    struck = job.strike(fault, is_over=False)
    _kill(pid, signal.SIGSTOP)
    job.wait(fault.amount)
    _kill(pid, signal.SIGCONT)
    return job.undone(struck)


def _stop_for_good(job: Supervised, fault: Fault) -> bool:
    pid = job.agents.ranks().get(fault.rank)
    if pid is None:
        return False
    struck = job.strike(fault)
    _kill(pid, signal.SIGSTOP)
    most = COLLECTIVE_SECONDS + 60
    if job.wait(most, lambda: pid not in job.agents.ranks().values()):
        struck.note = f"stopped rank ended after {job.seconds - struck.seconds:.1f} s"
    else:
        job.troubles.append(f"fault {fault.number}: a stopped rank was still there after {most} s")
        _kill(pid)
    return True


def _restart(job: Supervised, fault: Fault) -> bool:
    ranks = job.agents.ranks()
    if not job.open:
        # It was faster than the fault.
        return _kill_rank(job, fault._replace(kind="kill_rank"))
    if ranks:
        rank = sorted(ranks)[fault.rank % len(ranks)]
        _kill(ranks[rank])
        job.strike(fault, f"rank {rank} of {len(ranks)}")
        return True
    return _kill_agent(job, fault)


def _within(job: Supervised, fault: Fault) -> bool:
    _order(job, fault)
    fired = job.place.control / f"fired_{fault.number}"
    came = job.wait(FIRES_WITHIN_SECONDS, lambda: fired.exists() or job.agents.are_done) and fired.exists()
    if came:
        job.strike(fault)
    _withdraw(job)
    return came


def _slow(job: Supervised, fault: Fault) -> bool:
    struck = job.strike(fault, is_over=False)
    _order(job, fault)
    job.wait(WINDOW_SECONDS, lambda: _slowed(job, fault) >= 2)
    _withdraw(job)
    return job.undone(struck, f"{_slowed(job, fault)} flushes slowed")


def _slowed(job: Supervised, fault: Fault) -> int:
    return sum(1 for _ in job.place.control.glob(f"fired_{fault.number}_*"))


def _clock(job: Supervised, fault: Fault) -> bool:
    struck = job.strike(fault, is_over=False)
    _order(job, fault)
    begun = job.high
    job.wait(WINDOW_SECONDS, lambda: job.high > begun + 2)
    _withdraw(job)
    return job.undone(struck, f"{fault.amount / 3600:.1f} h for {job.high - begun} updates")


def _full(job: Supervised, fault: Fault) -> bool:
    struck, refused = job.strike(fault, is_over=False), _refusals(job)
    end = time.monotonic() + fault.amount
    while time.monotonic() < end:
        job.place.fill()
        job.wait(0.2)
    # Until a checkpoint was refused, so that it was not for nothing.
    job.wait(WINDOW_SECONDS, lambda: _refusals(job) > refused)
    job.place.free()
    return job.undone(struck, f"{_refusals(job) - refused} checkpoints refused")


def _readonly(job: Supervised, fault: Fault) -> bool:
    refused = _refusals(job)
    if not job.place.set_read_only(True):
        return False
    struck = job.strike(fault, is_over=False)
    job.wait(fault.amount)
    job.wait(WINDOW_SECONDS, lambda: _refusals(job) > refused)
    job.place.set_read_only(False)
    return job.undone(struck, f"{_refusals(job) - refused} checkpoints refused")


def _cut(job: Supervised, fault: Fault) -> bool:
    assert job.place.network is not None
    struck = job.strike(fault, is_over=False)
    job.place.network.cut_off(fault.rank % job.configuration.hosts)
    job.wait(fault.amount)
    job.place.network.reconnect(fault.rank % job.configuration.hosts)
    return job.undone(struck)


def _cut_for_long(job: Supervised, fault: Fault) -> bool:
    assert job.place.network is not None
    struck = job.strike(fault, is_over=False)
    before = set(job.agents.ranks().values())
    job.place.network.cut_off(fault.rank % job.configuration.hosts)
    gone = job.wait(COLLECTIVE_SECONDS + 60, lambda: not before & set(job.agents.ranks().values()))
    job.place.network.reconnect(fault.rank % job.configuration.hosts)
    job.undone(struck, f"reconnected after {job.seconds - struck.seconds:.1f} s")
    if not gone:
        job.troubles.append(f"fault {fault.number}: ranks still wait, {COLLECTIVE_SECONDS + 60} s after a cut")
    return True


def _order(job: Supervised, fault: Fault) -> None:
    beside = job.place.control / "order.new"
    beside.write_text(json.dumps(fault._asdict()))
    beside.replace(job.place.control / "order")


def _withdraw(job: Supervised) -> None:
    (job.place.control / "order").unlink(missing_ok=True)


def _refusals(job: Supervised) -> int:
    """How often the job said that a checkpoint could not be written."""
    return (job.place.root / "log").read_bytes().count(b"tried again at the next")


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


INJECTIONS: dict[str, Callable[[Supervised, Fault], bool]] = {
    "kill_rank": _kill_rank,
    "kill_all": _kill_all,
    "kill_agent": _kill_agent,
    "kill_worker": _kill_worker,
    "term": _term,
    "stop": _stop,
    "stop_for_good": _stop_for_good,
    "restart": _restart,
    "slow": _slow,
    "clock": _clock,
    "full": _full,
    "readonly": _readonly,
    "cut": _cut,
    "cut_for_long": _cut_for_long,
}
