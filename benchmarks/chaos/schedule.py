"""Which faults hit a job, when and how: a function of the campaign's seed and the job's number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of fault."""

    text: str
    weight: int
    """How often, in relation to the others."""
    amounts: tuple[float, float] = (0.0, 1.0)
    """Between what its amount is drawn: seconds, or a share."""
    restarts: bool = True
    """Whether ranks end by it."""
    needs: str = ""
    """`root`: to mount a file system; `hosts`: ranks on hosts of their own."""
    rank: int | None = None
    """The only rank that it can hit; None: any."""


# A start costs ten times what the others cost: so most faults are such that no rank ends by them.
KINDS = {
    "kill_rank": Kind("SIGKILL of one rank", 8),
    "kill_all": Kind("SIGKILL of all ranks at once", 5),
    "kill_agent": Kind("SIGKILL of the agent; its ranks must be gone within 10 s", 5),
    "kill_worker": Kind("SIGKILL of a loader process", 5),
    "term": Kind("SIGTERM to the job (preemption), then a new start", 5),
    "stop_for_good": Kind("SIGSTOP of a rank for ever", 2),
    "write": Kind("SIGKILL of rank 0 within the write of a checkpoint", 7, (0.02, 0.98), rank=0),
    "rename": Kind("SIGKILL of rank 0 just before or after the rename of a checkpoint", 6, rank=0),
    "prune": Kind("SIGKILL of rank 0 within the removal of an old checkpoint", 6, rank=0),
    "validation": Kind("SIGKILL of a rank within validation", 5),
    "restart": Kind("SIGKILL of a rank, or of the agent, while the job starts again", 0, (0.0, 15.0)),
    "stop": Kind("SIGSTOP of a rank for 1 to 2 s", 70, (1.0, 2.0), restarts=False),
    "full": Kind("disk full until a save is refused", 140, (0.1, 0.6), restarts=False, needs="root"),
    "readonly": Kind("disk read-only until a save is refused", 130, (0.1, 0.6), restarts=False, needs="root"),
    "slow": Kind("disk slow: each flush takes 0.2 to 0.8 s longer, for a while", 90, (0.2, 0.8), False, rank=0),
    "clock": Kind("clock of a rank set back by up to a day, for a while", 120, (10.0, 86400.0), restarts=False),
    "cut": Kind("host cut off the network for 1 to 4 s", 300, (1.0, 4.0), restarts=False, needs="hosts"),
    "cut_for_long": Kind("host cut off the network for longer than the ranks wait", 6, needs="hosts"),
}
AGAIN = 0.6
"""How likely a fault that ends ranks is followed by one while they start again, and that by another."""


class Fault(NamedTuple):
    """One fault of a job's schedule."""

    number: int
    kind: str
    at_step: int
    """It is due when the job has come so far."""
    rank: int
    amount: float


def schedule(
    seed: int, job: int, ranks: int, last_step: int, kinds: Sequence[str], gaps: tuple[int, int] = (2, 5)
) -> list[Fault]:
    """The faults of job number `job` on so many `ranks`, which ends with `last_step`.

    A fault within a restart follows upon one that makes the job start again, at the same step.
    """
    rng = random.Random(f"{seed} {job}")
    plain = [kind for kind in kinds if kind != "restart"] or ["kill_rank"]
    weights = [KINDS[kind].weight for kind in plain]
    again = AGAIN if "restart" in kinds else 0.0
    faults: list[Fault] = []

    def add(kind: str, step: int) -> None:
        rank = KINDS[kind].rank
        target = rng.randrange(ranks) if rank is None else rank
        faults.append(Fault(len(faults), kind, step, target, round(rng.uniform(*KINDS[kind].amounts), 3)))

    step = rng.randint(*gaps)
    while step < last_step - gaps[1]:
        add(rng.choices(plain, weights)[0], step)
        while KINDS[faults[-1].kind].restarts and rng.random() < again:
            add("restart", step)
        step += rng.randint(*gaps)
    return faults
