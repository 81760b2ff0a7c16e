"""A rank that stands still says where, before anything ends it: the stacks of its threads, in its log and in a file.

Ranks that wait for it in a collective stand still too, and are the first to fail, with an error that tells of the
network. So each notes when it last came forward; who stopped first is the cause.

`RUN/stacks/rank_NNNNN.txt`: a line of JSON (`Still`), then the stacks.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from esam_dist.errors import UserError, printable
from esam_dist.ranks import Ranks

logger = logging.getLogger(__name__)

FOLDER = "stacks"
SHARE = 0.8
"""Of the seconds after which a collective fails: then a rank has said what it does before another one fails of it."""
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)

Sign = tuple[float, str]
"""When a rank last came forward (`time.monotonic`), and to where."""


@dataclass(frozen=True)
class Still:
    """A rank that stands still."""

    rank: int
    host: str
    pid: int
    since: float
    """Unix time of its last progress."""
    seconds: float
    """So long it had stood still when it said so."""
    last: str
    """What it had done last."""
    world_size: int = 1

    def line(self, where: str) -> str:
        """In words; `where` is the innermost call of its main thread."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.since)) + f"{self.since % 1:.3f}"[1:]
        text = f"rank {self.rank} on {self.host} (process {self.pid}), since {clock}, behind {self.last}"
        return printable(text + (f", in {where}" if where else ""))


class Watchdog:
    """Looks from a thread of its own whether this rank comes forward; `signs` tell when it did, and are added to.

    Even where a call within C never gives the interpreter back, its stacks come out, in the log only.
    """

    def __init__(self, folder: Path, ranks: Ranks, seconds: float) -> None:
        self._path = folder / FOLDER / f"rank_{ranks.rank:05d}.txt"
        self._rank, self._world_size, self._seconds = ranks.rank, ranks.world_size, seconds
        began = time.monotonic()
        self.signs: list[Callable[[], Sign]] = [lambda: (began, "the start")]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin."""
        with suppress(OSError):
            if self._rank == 0:
                shutil.rmtree(self._path.parent)
            self._path.unlink()
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        armed = told = 0.0
        while not self._over.wait(min(1.0, self._seconds / 10)):
            when, last = max(sign() for sign in self.signs)
            still = time.monotonic() - when
            if told and when > told:
                logger.warning("rank %d goes on", self._rank)
                told = 0.0
            if not told and still >= self._seconds:
                told = when
                self._tell(still, last)
            # By a thread of C, should this one not be let run; told again in vain otherwise.
            if not told and when > armed and sys.__stderr__ is not None:
                armed = when
                with suppress(OSError, ValueError, RuntimeError):
                    faulthandler.dump_traceback_later(1.1 * self._seconds - still, file=sys.__stderr__)
            elif told:
                faulthandler.cancel_dump_traceback_later()

    def _tell(self, seconds: float, last: str) -> None:
        since = time.time() - seconds
        still = Still(self._rank, socket.gethostname(), os.getpid(), since, seconds, last, self._world_size)
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("w") as file:
                file.write(json.dumps(asdict(still)) + "\n")
                file.flush()
                faulthandler.dump_traceback(file)
        logger.error("stands still for %.0f s: %s; its stacks, also in %s:", seconds, still.line(""), self._path)
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr)


@contextmanager
def watching(folder: Path, ranks: Ranks, timeout_seconds: float) -> Iterator[Watchdog]:
    """Watch this rank for the length of the block. An error that ends it is preceded by who stood still first."""
    dog = Watchdog(folder, ranks, SHARE * timeout_seconds)
    dog.start()
    try:
        yield dog
    except UserError:
        raise
    except Exception:
        for line in causes(folder):
            logger.error("%s", line)
        raise
    finally:
        dog.stop()


def causes(folder: Path, since: float = 0.0) -> list[str]:
    """Who stood still in the run in `folder`, the first one first, in a line each; said after Unix time `since`.

    Before them stands who has said nothing, as a process that is stopped or gone does not.
    """
    found: list[tuple[Still, str, Path]] = []
    for path in sorted((folder / FOLDER).glob("rank_*.txt")):
        with suppress(OSError, ValueError, TypeError):
            if path.stat().st_mtime < since:
                continue
            head, _, stacks = path.read_text(errors="replace").partition("\n")
            found.append((Still(**json.loads(head)), innermost(stacks), path))
    found.sort(key=lambda each: each[0].since)
    known = {still.rank for still, _, _ in found}
    world_size = max((still.world_size for still, _, _ in found), default=0)
    silent = [str(rank) for rank in range(world_size) if rank not in known]
    unknown = f"no word from rank {', '.join(silent[:8])}{' and more' if len(silent) > 8 else ''}"
    unknown += ": ended, stopped, or with another disk; others may wait for it"
    return [unknown] * bool(silent) + [
        f"{'stood still first' if place == 0 else 'then'}: {still.line(where)}; its stacks: {path}"
        for place, (still, where, path) in enumerate(found)
    ]


def innermost(stacks: str) -> str:
    """The innermost call of the main thread, which comes last: `file:line function`; empty where none is shown."""
    frame = _FRAME.search(stacks, stacks.rfind("hread 0x") + 1)
    return f"{frame[1]}:{frame[2]} {frame[3]}" if frame else ""
