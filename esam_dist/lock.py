"""The lock of a run folder: one job at a time, whoever was killed before.

`run.lock` is made by rank 0 in one step that fails where it exists (O_EXCL), says who holds it, and is touched every
few seconds. It is not flock: that does not hold across hosts on every network file system. A holder that is gone is
known on its own machine by its process, elsewhere by a lock that nobody touched for STALE_SECONDS.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esam_dist import process
from esam_dist.errors import UserError, printable
from esam_dist.files import flush_file

if TYPE_CHECKING:
    from esam_dist.ranks import Ranks

logger = logging.getLogger(__name__)

FILE = "run.lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A lock of another machine that nobody has touched for this long has no holder any more."""


_held: list[Lock] = []


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str = "an unknown host"
    pid: int = 0
    place: str = ""
    """The boot and the table of processes in which `pid` means something."""
    began: str = ""
    """When the process began: a later one may get the same id."""
    since: str = "an unknown time"
    token: str = ""

    @staticmethod
    def here() -> Holder:
        """This process, with a token of its own."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        began = process.began(os.getpid()) or ""
        return Holder(socket.gethostname(), os.getpid(), process.place(), began, since, secrets.token_hex(8))

    @staticmethod
    def parsed(content: bytes) -> Holder:
        """Who wrote `content`; an unknown holder where that cannot be told, as while it is being written."""
        try:
            holder = Holder(**json.loads(content))
        except (ValueError, TypeError, RecursionError):
            return Holder()
        texts = (holder.host, holder.place, holder.began, holder.since, holder.token)
        known = isinstance(holder.pid, int) and all(isinstance(text, str) for text in texts)
        return holder if known else Holder()


class Lock:
    """The lock of `folder`; `take` it, `check` it before writing, `release` it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE
        self._me = Holder.here()
        self._content = json.dumps(asdict(self._me)).encode() + b"\n"
        self._released = threading.Event()
        self._turn = threading.Lock()

    def take(self) -> None:
        """Hold the folder from now on. Raises UserError where another job does, or where it cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._created():
                content = self._read()
                if content is None:
                    continue
                holder = Holder.parsed(content)
                if self._lives(holder, content):
                    raise UserError(
                        f"run.folder = {self._folder}: process {holder.pid} on {printable(holder.host)} trains there "
                        f"since {printable(holder.since)}; stop it, or choose another run.folder"
                    )
                if self._read() == content:
                    logger.warning("%s: process %d on %s is gone", self._path, holder.pid, printable(holder.host))
                    self._move_away(content)
        except OSError as error:
            raise UserError(
                f"run.folder = {self._folder}: cannot be written ({error.strerror}); choose another"
            ) from error
        threading.Thread(target=self._beat, name="run.lock", daemon=True).start()

    def check(self) -> None:
        """Raise UserError where another job has taken the folder over; make the lock again where it is missing."""
        with self._turn:
            try:
                content = self._read()
                if self._released.is_set() or (content is None and self._created()):
                    return
            except OSError:
                return  # the folder is gone, or its disk is ill: whoever writes there will see
        if content is not None and content != self._content:
            holder = Holder.parsed(content)
            raise UserError(
                f"run.folder = {self._folder}: was taken over by process {holder.pid} on {printable(holder.host)}, as "
                "this job gave no sign of life; this one ends"
            )

    def release(self) -> None:
        """Let the next job have the folder."""
        with self._turn, suppress(OSError):
            self._released.set()
            if self._read() == self._content:
                self._path.unlink()

    def _created(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._content)
                flush_file(file)
        except OSError:
            self._path.unlink()
            raise
        return True

    def _read(self) -> bytes | None:
        # Opened anew each time: only then does a client of NFS ask its server.
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _lives(self, holder: Holder, content: bytes) -> bool:
        if holder.place and holder.place == self._me.place:
            return process.began(holder.pid) in ("", holder.began)
        touched = self._touched()
        if touched is None or self._now() - touched > STALE_SECONDS:
            return False
        logger.info(
            "%s: held by process %d on %s; watching for up to %.0f s whether it lives",
            *(self._path, holder.pid, printable(holder.host), STALE_SECONDS),
        )
        until = time.monotonic() + STALE_SECONDS  # the date may lie ahead, where a clock was set back
        while self._now() - touched <= STALE_SECONDS and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 5)
            if self._read() != content:
                return False  # released, or another's: look again
            if self._touched() != touched:
                return True
        return False

    def _touched(self) -> float | None:
        try:
            with self._path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The time by the clock that dates files in the folder: that of its server, which need not be ours."""
        probe = self._path.with_name(f".lock_{self._me.token}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _move_away(self, content: bytes) -> None:
        """Remove the lock that holds `content`, and no other: of two who try, one gets it by its rename."""
        aside = self._path.with_name(f".lock_{self._me.token}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() != content:
            # Another job was faster, and this is its new lock. Where it made it again meanwhile, that one stays.
            with suppress(OSError):
                os.link(aside, self._path)
        aside.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                self.check()
                os.utime(self._path)
            except UserError as error:
                logger.error("%s", error)  # the next checkpoint ends the run
                return
            except OSError:
                continue


def release_all() -> None:
    """Let go of what this process holds, where it ends without leaving its blocks."""
    for lock in _held:
        lock.release()


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Hold the run folder `folder` for the length of the block, where this is rank 0.

    Yields a check for whoever is to write there. Raises UserError where another job holds it.
    """
    if not ranks.is_first:
        yield lambda: None
        return
    lock = Lock(folder)
    _held.append(lock)
    try:
        lock.take()
        yield lock.check
    finally:
        lock.release()
        _held.remove(lock)
