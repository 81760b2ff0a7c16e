"""Fetch whole shards from where webdataset can open them: retried with growing pauses, kept in a folder if asked to.

A shard is fetched whole before it is read, so a connection that breaks in the middle costs a retry, not samples; so
does an answer that is no tar, or only the beginning of one.

`${NAME}` in a URL stands for a variable of the environment. It is filled in where the shard is opened and nowhere else,
so that a secret is in no log, and in no file of the run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, cast

from webdataset.gopen import gopen

from esam_dist.data.open_files import is_special
from esam_dist.data.tar import BROKEN, check_whole
from esam_dist.errors import printable
from esam_dist.files import replacing

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0
"""A server or a command that gives no byte for so long has failed."""


VARIABLE = re.compile(r"\$\{(\w+)\}")


class FetchError(Exception):
    """A shard that could not be fetched, after all tries; `reason` is a short word for the counters."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _BrokenError(OSError):
    """What came is not a whole tar."""


def fetch(url: str, *, tries: int, cache: Path | None = None, first_pause: float | None = None) -> IO[bytes]:
    """The contents of `url` as an open file, from `cache` if it is there. Raises FetchError after `tries` tries."""
    kept = cache / _cache_name(url) if cache is not None else None
    if kept is not None and kept.exists():
        return kept.open("rb")
    for attempt in range(1, tries + 1):
        try:
            return _fetch_once(url, kept)
        except (OSError, HTTPException, ValueError) as error:
            reason = printable(_hidden(str(error), url))
            if attempt == tries:
                kind = "broken_shard" if isinstance(error, _BrokenError) else "unreachable"
                raise FetchError(f"{url}: {reason} ({tries} tries)", kind) from None
            pause = (FIRST_PAUSE_SECONDS if first_pause is None else first_pause) * 2 ** (attempt - 1)
            log.warning("%s: %s; trying again in %.1f s", url, reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _fetch_once(url: str, kept: Path | None) -> IO[bytes]:
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Workers of all ranks, on all nodes, share the folder; whoever is done last wins, with the same bytes.
        with replacing(kept) as file:
            _copy(url, file)
            _check_tar(file)
        return kept.open("rb")
    unnamed = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115  # the caller closes it
    try:
        _copy(url, unnamed)
        _check_tar(unnamed)
    except BaseException:
        unnamed.close()
        raise
    unnamed.seek(0)
    return unnamed


def variables(url: str) -> dict[str, str | None]:
    """The variables that `url` names, with their values, None where the environment has none.

    A shell fills in those of a `pipe:` itself, and may have more of its own: none are named here.
    """
    if url.startswith("pipe:"):
        return {}
    # A secret that was read from a file often ends with a line break.
    return {name: os.environ[name].strip() if name in os.environ else None for name in VARIABLE.findall(url)}


def _filled(url: str) -> str:
    values = variables(url)
    return VARIABLE.sub(lambda found: values.get(found[1]) or "", url) if values else url


def _hidden(text: str, url: str) -> str:
    """`text` with the names in place of the values that `_filled` put into `url`."""
    for name, value in variables(url).items():
        for shown in {value, repr(value)[1:-1]} if value else ():
            text = text.replace(shown, f"${{{name}}}")
    return text


def _copy(url: str, file: IO[bytes]) -> None:
    url = _filled(url)
    if url.startswith(("http://", "https://")):
        try:
            answer = urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            # It holds the connection open.
            error.close()
            raise
        with answer:
            shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
        if expected is not None and file.tell() != int(expected):
            raise OSError(f"got {file.tell()} of {expected} bytes")
        return
    if url.startswith("pipe:"):
        _copy_output(url.removeprefix("pipe:"), file)
    elif url.startswith("s3://"):
        # webdataset itself knows no s3:; the command line tool of the cloud is what its users pipe from.
        _copy_output(f"aws s3 cp {shlex.quote(url)} -", file)
    else:
        # A named pipe under a shard's name would be waited for, for ever; `pipe:` says that one is meant.
        if is_special(url.removeprefix("file:")):
            raise OSError("no regular file")
        with gopen(url) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)


def _copy_output(command: str, file: IO[bytes]) -> None:
    """What a shell's `command` writes. Raises OSError when it fails or gets stuck; nothing of it stays behind."""
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            while block := _read_soon(process.stdout.fileno()):
                file.write(block)
            status = process.wait(TIMEOUT_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, (TimeoutError, subprocess.TimeoutExpired)):
                raise OSError(f"the command did nothing for {TIMEOUT_SECONDS:g} seconds") from None
            raise
    # A pipe whose last part has read enough ends the ones before it by SIGPIPE.
    if status not in (0, 128 + signal.SIGPIPE):
        raise OSError(f"the command ended with status {status}")


def _read_soon(pipe: int) -> bytes:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    if not poll.poll(TIMEOUT_SECONDS * 1000):
        raise TimeoutError
    return os.read(pipe, 1 << 20)


def _check_tar(file: IO[bytes]) -> None:
    """Raise OSError unless `file` is a tar, compressed or not, that is there whole."""
    try:
        check_whole(file)
    except BROKEN as error:
        raise _BrokenError(f"is no whole tar ({str(error) or type(error).__name__})") from None


def _cache_name(url: str) -> str:
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
