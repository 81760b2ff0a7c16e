"""Nodes compare their versions and configurations before a fixed-size job starts.

They meet at the rendezvous port itself, which torchrun opens only afterwards: no further port has to be open.
"""

from __future__ import annotations

import contextlib
import json
from datetime import timedelta
from typing import TYPE_CHECKING

from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job

if TYPE_CHECKING:
    # torch exports it only where it was built with distributed, which mypy does not see; so below, and in checks.py.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

SECONDS = 300


def compare(job: Job, facts: dict[str, str], seconds: float = SECONDS) -> None:
    """Wait for all nodes of `job` and compare `facts` with node 0's.

    Raises UserError that names node and fact where they differ, or when the nodes do not meet within `seconds`.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    me = job.node_rank or 0
    limit = timedelta(seconds=seconds)
    try:
        store = TCPStore(job.host, job.port, job.max_nodes, me == 0, timeout=limit)
        store.set(f"facts/{me}", json.dumps(facts))
        told = [json.loads(store.get(f"facts/{node}")) for node in range(job.max_nodes)]
        _leave(store, me, job.max_nodes)
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"--rendezvous {job.meeting_point}: the {job.max_nodes} nodes did not meet within {seconds:g} s "
            f"({reason}); start this command on every node, each with its own --node-rank"
        ) from None
    for node, theirs in enumerate(told):
        for fact, value in told[0].items():
            if theirs.get(fact) != value:
                raise UserError(_difference(node, fact, theirs.get(fact), value))


def _leave(store: TCPStore, me: int, nodes: int) -> None:
    # Node 0 holds the store and closes it when all have read everything. Until then nobody goes on: torchrun of a fast
    # node would find this store in place of its own, and lose it when a slow one has left.
    from torch.distributed import DistNetworkError

    if me:
        store.set(f"left/{me}", "")
        with contextlib.suppress(DistNetworkError):  # closed
            store.get("never set")
    else:
        for node in range(1, nodes):
            store.get(f"left/{node}")


def _difference(node: int, fact: str, theirs: str | None, first: str) -> str:
    if fact == "config":
        lines = set((theirs or "").splitlines()) ^ set(first.splitlines())
        shown = "; ".join(sorted(map(str.strip, lines)))
        return f"node {node} has another config than node 0 ({shown}); give all nodes the same"
    return f"node {node} runs {fact} {theirs}, node 0 runs {first}; install the same on all nodes"
