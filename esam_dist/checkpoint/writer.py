"""Checkpoints written behind training: one thread, one checkpoint at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from esam_dist.checkpoint.folder import Checkpoints
from esam_dist.errors import UserError
from esam_dist.soundness import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How the writing of one checkpoint ended."""

    step: int
    seconds: float
    """Until it was read back and had its name."""
    error: UserError | RuntimeError | None = None
    """Why there is none: a CheckpointNotWrittenError of the disk's, another UserError, or a fault of ours."""


class Writer:
    """Saves to `checkpoints` from a thread. A second save waits for the first: so one copy of the state is held."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._waiting: State = {}
        # Not Thread.join: that takes a thread for ended once a Ctrl-C came into the wait (CPython up to 3.12).
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._ended: deque[Outcome] = deque()
        self._given_up = threading.Event()

    def begin(self, state: State, step: int, accuracy: float | None) -> None:
        """Begin to write `state`, which nobody may change any more."""
        self.wait()
        self._waiting = state
        self._is_idle.clear()
        threading.Thread(target=self._write, args=(step, accuracy), name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Return when none is being written."""
        self._is_idle.wait()

    def give_up(self) -> None:
        """Break off what is being written, and return when that is done: the folder is as it was before."""
        self._given_up.set()
        self.wait()

    def next_ended(self) -> Outcome | None:
        """The outcome that nobody has asked for yet, oldest first; None: there is none."""
        return self._ended.popleft() if self._ended else None

    def _write(self, step: int, accuracy: float | None) -> None:
        begun = time.perf_counter()
        state, self._waiting = self._waiting, {}
        try:
            error = self._error_of(state, step, accuracy)
            self._ended.append(Outcome(step, time.perf_counter() - begun, error))
        finally:
            del state  # as large as all that is trained
            self._is_idle.set()

    def _error_of(self, state: State, step: int, accuracy: float | None) -> UserError | RuntimeError | None:
        try:
            self.checkpoints.save(state, step, accuracy, self._given_up.is_set)
        except UserError as refused:
            return refused
        except Exception as fault:
            logger.exception("checkpoint of step %d", step)
            return RuntimeError(f"checkpoint of step {step}: {type(fault).__name__}: {fault}")
        return None
