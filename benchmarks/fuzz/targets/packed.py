"""Tars for the seeds, and bytes packed as their first one says: so mutations reach what is inside a checksum."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable

PACKED: tuple[Callable[[bytes], bytes], ...] = (
    bytes,
    lambda data: gzip.compress(data, 1),
    lambda data: bz2.compress(data, 1),
    lambda data: lzma.compress(data, preset=0),
)

BOMB = 0xFF
"""The first byte of what is followed by zeros without end."""
_ZEROS = gzip.compress(bytes(1 << 24), 9) * 40


def unpacked(data: bytes) -> bytes:
    """What the reader is given for `data`."""
    how, body = data[:1] or b"\0", data[1:]
    if how[0] == BOMB:
        return gzip.compress(body, 1) + _ZEROS
    return PACKED[how[0] % len(PACKED)](body)


def tar_of(files: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of `files`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()
