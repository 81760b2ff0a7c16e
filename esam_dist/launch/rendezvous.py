"""torchrun's c10d rendezvous, for a node that loses the network: it fails in time, and leaves the job to the others.

With torch 2.15 alone, the agent of a node that is cut off asks the store on node 0 and waits in the kernel until TCP
gives up, a quarter of an hour later, deaf to signals; if the network is back before, it fails and, on its way out,
closes the rendezvous for all: nobody can join again, itself included.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token, create_handler

T = TypeVar("T")
NAME = "esam-c10d"
# The store answers at once, or never: as long as torch waits for the connection.
SECONDS = 60.0


def register() -> str:
    """Make the rendezvous known to torchrun in this process; returns its name, for `--rdzv-backend`."""
    rendezvous_handler_registry.register(NAME, _create)
    return NAME


def explained(error: Exception) -> str:
    """What `error`, one of a rendezvous, means to the user, in one line."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, RendezvousTimeoutError):
        return "too few nodes came in time; start this command on every node"
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the job, and its log says why; start the job again on every node"
    if isinstance(error, RendezvousConnectionError):
        return (
            f"this node lost it ({reason}): its network, or node 0, is down; the other nodes go on where the job is "
            "elastic. Start this command again to join them"
        )
    return f"{reason}; start the job again on every node"


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    backend, store = create_backend(parameters)
    return create_handler(store, Impatient(backend, SECONDS), parameters)


class Impatient(RendezvousBackend):
    """`inner`, but a call without an answer for `seconds` raises RendezvousConnectionError, and so do all later ones.

    The later ones too, so that an agent that has given up cannot close the rendezvous of those who go on.
    """

    def __init__(self, inner: RendezvousBackend, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds
        self._lost: str | None = None

    @property
    def name(self) -> str:
        """See `RendezvousBackend`."""
        return NAME  # torch compares it with what was asked for

    def get_state(self) -> tuple[bytes, Token] | None:
        """See `RendezvousBackend`."""
        return self._ask(self._inner.get_state)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """See `RendezvousBackend`."""
        return self._ask(lambda: self._inner.set_state(state, token))

    def _ask(self, call: Callable[[], T]) -> T:
        if self._lost is not None:
            raise RendezvousConnectionError(self._lost)
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))

        # A thread for each call, as one that hangs is never heard of again; the caller waits where signals reach it.
        threading.Thread(target=work, daemon=True).start()
        try:
            answer, error = answers.get(timeout=self._seconds)
        except queue.Empty:
            answer, error = None, RendezvousConnectionError(f"no answer within {self._seconds:g} s")
        if isinstance(error, RendezvousConnectionError):
            self._lost = str(error)
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]
