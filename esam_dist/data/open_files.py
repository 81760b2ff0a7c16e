"""Files as they are opened here: regular ones only, and no more at a time than the process may have."""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
from os import PathLike

from esam_dist.errors import UserError

_SPARE = 24
"""For what else a process opens for a moment: libraries, sockets, the program's own files."""
_PER_WORKER = 4
"""Pipes to a worker, in the process that started it."""


def open_regular(path: str | PathLike[str], flags: int = os.O_RDONLY) -> int:
    """A descriptor of the file at `path`; an `opener` for `open`. Raises OSError, also for what is no regular file.

    A named pipe would be waited for, for ever, and a device need not end.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
    return descriptor


def read_regular(path: str | PathLike[str]) -> bytes:
    """The contents of the file at `path`. Raises OSError, also for what is no regular file."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()


def is_special(path: str) -> bool:
    """Whether `path` is there, and neither a file nor a link to one: a pipe, a device, a folder."""
    return os.path.exists(path) and not os.path.isfile(path)


def num_free() -> int:
    """How many more files this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        return max(0, limit - len(os.listdir("/dev/fd")))
    except OSError as error:
        # Not even that folder can be opened; or this system has none.
        return 0 if error.errno in (errno.EMFILE, errno.ENFILE) else limit


def check_open_files(workers: int, key: str) -> None:
    """Raise UserError, naming `key`, when the limit of open files is too low for so many workers.

    Met later, it would look like bad samples, or end a worker.
    """
    needed, free = _SPARE + _PER_WORKER * workers, num_free()
    if free < needed:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"{key} = {workers}: needs {needed} more open files, and {free} of {limit} are free; raise the limit "
            f"(`ulimit -n 4096`; docker run --ulimit nofile=4096){', or use fewer workers' if workers else ''}"
        )
