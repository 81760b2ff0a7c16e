"""Loader processes outlive the signal that stops their rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading


def outlive_stop(_: int) -> None:
    """Let only the rank itself end this loader process with SIGTERM; a `worker_init_fn`.

    torchrun and Slurm send SIGTERM to every process of a rank. A rank whose loaders died of it could not reach the
    step at which all ranks stop, and would fail instead of writing its checkpoint.
    """
    rank = multiprocessing.parent_process()
    if sys.platform != "linux" or rank is None:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for, args=(rank.pid,), daemon=True).start()


def _end_for(rank: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)
