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
        self._thread: threading.Thread | None = None
        self._ended: deque[Outcome] = deque()
        self._given_up = threading.Event()

    def begin(self, state: State, step: int, accuracy: float | None) -> None:
        """Begin to write `state`, which nobody may change any more."""
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(state, step, accuracy), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when none is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def give_up(self) -> None:
        """Break off what is being written, and return when that is done: the folder is as it was before."""
        self._given_up.set()
        self.wait()

    def next_ended(self) -> Outcome | None:
        """The outcome that nobody has asked for yet, oldest first; None: there is none."""
        return self._ended.popleft() if self._ended else None

    def _write(self, state: State, step: int, accuracy: float | None) -> None:
        begun = time.perf_counter()
        error: UserError | RuntimeError | None = None
        try:
            self.checkpoints.save(state, step, accuracy, self._given_up.is_set)
        except UserError as refused:
            error = refused
        except Exception as fault:
            logger.exception("checkpoint of step %d", step)
            error = RuntimeError(f"checkpoint of step {step}: {type(fault).__name__}: {fault}")
        self._ended.append(Outcome(step, time.perf_counter() - begun, error))
