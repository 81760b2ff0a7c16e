"""Files that are there whole or not at all: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""How the name of a file ends that is still being written; a kill may leave one behind."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the place of `path` when the block ends well; else `path` stays as it was.

    Whoever reads `path`, also after a power cut, finds the old content or the new. Its name is its own, so that two
    processes that write the same path do not mix. Raises OSError when the disk refuses.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with beside.open("x+b") as file:
            yield file
            flush_file(file)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    flush_folder(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Let `path` hold `content` (text as UTF-8), in one move. Raises OSError when the disk refuses."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def flush_file(file: BinaryIO) -> None:
    """Return when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Return when the names in `folder` are on the disk, as far as its file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no flush of a folder; their names are as safe as they can be.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left in `folder`; only for its sole writer."""
    for path in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            path.unlink()
