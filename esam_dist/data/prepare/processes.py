"""Work on many shards at a time, in processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from esam_dist.data.open_files import check_open_files
from esam_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def results(work: Callable[[Item], Result], jobs: Sequence[Item], workers: int) -> Iterator[Result]:
    """What `work` makes of each of `jobs`, in their order; `workers` 0 works in this process.

    Raises UserError when a worker is killed, or so many cannot be started.
    """
    workers = min(workers, len(jobs) or 1)
    check_open_files(workers, "--workers")
    if workers == 0:
        yield from map(work, jobs)
        return
    # Forked, so that a source held in memory is not copied to each worker.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,)) as pool:
        try:
            yield from pool.map(_call, jobs)
        except BrokenProcessPool:
            raise UserError(
                f"--workers {workers}: one of them was killed, perhaps for memory; use fewer (what is finished is kept)"
            ) from None


_work: Any = None


def _begin(work: Any) -> None:
    global _work  # noqa: PLW0603  # what a pool's initializer is for
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed cannot tell: its workers would write on, beside those of the run that is started next.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(job: Any) -> Any:
    return _work(job)
