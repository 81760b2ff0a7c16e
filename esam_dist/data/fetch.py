"""Fetch whole shards from where webdataset can open them: retried with growing pauses, kept in a folder if asked to.

A shard is fetched whole before it is read, so a connection that breaks in the middle costs a retry, not samples.

`${NAME}` in a URL stands for a variable of the environment. It is filled in where the shard is opened and nowhere else,
so that a secret is in no log, and in no file of the run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, cast

from webdataset.gopen import gopen

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0


VARIABLE = re.compile(r"\$\{(\w+)\}")


class FetchError(Exception):
    """A shard that could not be fetched, after all tries."""


def fetch(url: str, *, tries: int, cache: Path | None = None, first_pause: float | None = None) -> IO[bytes]:
    """The contents of `url` as an open file, from `cache` if it is there. Raises FetchError after `tries` tries."""
    kept = cache / _cache_name(url) if cache is not None else None
    if kept is not None and kept.exists():
        return kept.open("rb")
    for attempt in range(1, tries + 1):
        try:
            return _fetch_once(url, kept)
        except (OSError, HTTPException, ValueError) as error:
            reason = _hidden(str(error), url)
            if attempt == tries:
                raise FetchError(f"{url}: {reason} ({tries} tries)") from None
            pause = (FIRST_PAUSE_SECONDS if first_pause is None else first_pause) * 2 ** (attempt - 1)
            log.warning("%s: %s; trying again in %.1f s", url, reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _fetch_once(url: str, kept: Path | None) -> IO[bytes]:
    if kept is None:
        file = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115  # the caller closes it
    else:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Workers of all ranks share the folder; whoever is done last wins, with the same bytes.
        partial = kept.with_name(f"{kept.name}.{os.getpid()}.part")
        file = partial.open("w+b")
    try:
        _copy(url, file)
    except BaseException:
        file.close()
        if kept is not None:
            partial.unlink(missing_ok=True)
        raise
    if kept is not None:
        partial.replace(kept)
    file.seek(0)
    return file


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
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
        if expected is not None and file.tell() != int(expected):
            raise OSError(f"got {file.tell()} of {expected} bytes")
        return
    # webdataset itself knows no s3:; the command line tool of the cloud is what its users pipe from.
    opened = gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url)
    with opened as stream:
        shutil.copyfileobj(stream, file, 1 << 20)
    if file.tell() == 0:
        raise OSError("is empty")


def _cache_name(url: str) -> str:
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
