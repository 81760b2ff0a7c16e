"""Tar archives as far as shards need them: regular files in order, from bytes that nobody vouches for.

tarfile reads single headers here, but walks nothing: it follows a negative size backwards for ever (CVE-2025-8194),
calls itself for each header that stands before a member, takes a damaged one for the end, and makes as many zeros as a
sparse file claims.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, cast

from esam_dist.errors import printable

BLOCK = 512

BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What the reading of a damaged archive, plain or compressed, may raise."""

_MAX_HEADERS = 8
"""A member has a header of its own, and before it at most a long name, a long link, and two with PAX records."""
_MAX_TEXT = 1 << 20
"""Bytes of a long name, or of PAX records: paths have thousands, the attributes of files some ten thousands."""

_FREE_BYTES = 1 << 26
"""So much any compressed archive may hold."""
_MAX_RATIO = 32
"""Of more, so many times its own size. Small images gain little; what gains more is mostly zeros, made to exhaust."""
_MAX_FILE = 1 << 28
"""Bytes of one file that is read whole: many times those of any image that is decoded."""

_LABEL = re.compile(rb"\s*0*(\d{1,6})\s*")

_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_FOR_ALL, _FOR_NEXT = tarfile.XGLTYPE, (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = set(tarfile.SUPPORTED_TYPES) - {*_REGULAR, tarfile.GNUTYPE_SPARSE}

Records = dict[bytes, bytes]


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def members(file: IO[bytes], start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The files of the tar that lies in `file` from byte `start` to `end` (default: to its end), in order.

    At least one block of zeros must follow the last member, and nothing else may. Raises tarfile.ReadError, 'cut short
    or damaged at byte N', before a member that is not there whole, or at the end. `file` may be read from, and moved,
    in between.
    """
    stop, at = file.seek(0, os.SEEK_END) if end is None else end, start
    for_all: Records = {}
    while (found := _next(file, at, stop, for_all)) is not None:
        member, at = found
        if member is not None:
            yield member
    if stop - at < BLOCK or not _is_end(file, at, stop):
        raise tarfile.ReadError(f"cut short or damaged at byte {at}")


def contents(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a tar, which may be compressed. Raises one of BROKEN for a damaged one."""
    plain, end = _decompressed(file)
    for member in members(plain, end=end):
        if member.size > _MAX_FILE:
            raise tarfile.ReadError(f"a file of {member.size} bytes at byte {member.offset}: images are smaller")
        plain.seek(member.offset)
        data = _read(plain, member.size)
        if len(data) < member.size:
            raise tarfile.ReadError(f"cut short at byte {member.offset}")
        yield member.name, data


def check_whole(file: IO[bytes]) -> None:
    """Raise one of BROKEN unless `file` is a tar, compressed or not, up to the zeros at its end."""
    plain, end = _decompressed(file)
    for _ in members(plain, end=end):
        pass


def member_name(header: bytes) -> str:
    """The name in a tar header block, safe to print whatever the bytes are."""
    return printable(_name(header).decode("ascii", "backslashreplace"))


def label_of(text: bytes) -> int | None:
    """The label that a `.cls` holds; None: it holds no number from 0 to 999999."""
    found = _LABEL.fullmatch(text)
    return int(found[1]) if found else None


def label_beside(before: bytes, after: bytes) -> bytes | None:
    """The contents of an image's `.cls` that lies right beside it; None: none does.

    `before` are the three blocks that end with the image's own header, `after` those that follow its last one.
    """
    image = before[-BLOCK:]
    key = _name(image).rpartition(b".")[0]
    for beside in (after, before if len(before) == 3 * BLOCK else b""):
        stem, _, suffix = _name(beside).rpartition(b".")
        if suffix.lower() == b"cls" and stem == key and beside[345:500] == image[345:500]:
            size = _size(beside)
            return beside[BLOCK : BLOCK + size] if size <= BLOCK else None
    return None


def in_blocks(size: int) -> int:
    """The bytes that so many take in a tar: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _next(file: IO[bytes], at: int, stop: int, for_all: Records) -> tuple[Member | None, int] | None:
    """What begins at `at`: a regular file, or None for anything else; and where the next one begins.

    None for neither: what is there is the end, or damaged.
    """
    own: Records = {}
    for _ in range(_MAX_HEADERS):
        header = _header(file, at)
        at += BLOCK
        if header is None:
            return None
        if header.type not in (_LONG_NAME, _LONG_LINK, _FOR_ALL, *_FOR_NEXT):
            return _member(header, at, stop, for_all | own)
        if not 0 <= header.size <= min(_MAX_TEXT, stop - at):
            return None
        text = file.read(header.size)
        at += in_blocks(header.size)
        records = _long(header, text) if header.type in (_LONG_NAME, _LONG_LINK) else _pax(text)
        if records is None:
            return None
        (for_all if header.type == _FOR_ALL else own).update(records)
    return None


def _header(file: IO[bytes], at: int) -> tarfile.TarInfo | None:
    file.seek(at)
    try:
        return tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None


def _member(header: tarfile.TarInfo, at: int, stop: int, records: Records) -> tuple[Member | None, int] | None:
    if header.type in _WITHOUT_DATA:
        return None, at
    # Of a sparse file the archive holds only parts, and any size is claimed; no shard has one.
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records):
        return None
    told = records.get(b"size", b"%d" % header.size)
    size = int(told) if told.isdigit() and len(told) < 20 else -1
    following = at + in_blocks(size)
    if size < 0 or following > stop:
        return None
    name = records[b"path"].decode("utf-8", "surrogateescape") if b"path" in records else header.name
    return (Member(name, at, size) if header.type in _REGULAR else None), following


def _long(header: tarfile.TarInfo, text: bytes) -> Records:
    return {b"path": text.split(b"\0", 1)[0]} if header.type == _LONG_NAME else {}


def _pax(text: bytes) -> Records | None:
    """Records of `LENGTH KEY=VALUE\\n`, where LENGTH counts all of it; None: they are damaged."""
    records, place = {}, 0
    while place < len(text):
        digits = text[place : place + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = text[place + len(digits) + 1 : place + length].partition(b"=")
        if not (equals and value.endswith(b"\n") and place + length <= len(text)):
            return None
        records[key] = value[:-1]
        place += length
    return records


def _decompressed(file: IO[bytes]) -> tuple[IO[bytes], int | None]:
    """`file`, or what it is when decompressed; and its end where that takes no reading, else as far as can be."""
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    # The first bytes of a tar are a name, which may be anything.
    if _header(file, 0) is None:
        for magic, kind in _KINDS.items():
            if start.startswith(magic):
                most = max(_FREE_BYTES, _MAX_RATIO * file.seek(0, os.SEEK_END))
                file.seek(0)
                return cast(IO[bytes], _Bounded(kind(file), most)), sys.maxsize
    return file, None


class _Bounded:
    """What a file decompresses to, as far as byte `most`. Raises tarfile.ReadError beyond.

    A thousandth of it is enough to be written: it would fill the memory, or take for ever to read.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most

    def read(self, size: int) -> bytes:
        """As of files; at most one byte more than may be is decompressed."""
        data = self._file.read(min(size, self._most + 1 - self._file.tell()))
        self._check(self._file.tell())
        return data

    def seek(self, place: int) -> int:
        """As of files. Nothing is decompressed before a place that cannot be."""
        self._check(place)
        return self._file.seek(place)

    def tell(self) -> int:
        """As of files."""
        return self._file.tell()

    def _check(self, place: int) -> None:
        if place > self._most:
            raise tarfile.ReadError(f"decompresses to more than {self._most} bytes, {_MAX_RATIO} times its size")


_KINDS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb")),
    b"BZh": lambda file: cast(IO[bytes], bz2.BZ2File(file)),
    b"\xfd7zXZ\0": lambda file: cast(IO[bytes], lzma.LZMAFile(file)),  # noqa: SIM115  # its owner closes it
    b"]\0\0\x80": lambda file: cast(IO[bytes], lzma.LZMAFile(file)),  # noqa: SIM115
}


def _read(file: IO[bytes], size: int) -> bytes:
    """Up to `size` bytes, without room for more of them than there are."""
    parts = []
    while size and (part := file.read(min(size, 1 << 22))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _is_end(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether a block of zeros is at `start`, and nothing but zeros up to `stop`."""
    file.seek(start)
    if file.read(BLOCK) != bytes(BLOCK):
        return False
    parts = iter(lambda: file.read(min(1 << 20, stop - file.tell())), b"")
    return not any(part.strip(b"\0") for part in parts)


def _name(header: bytes) -> bytes:
    return header[:100].split(b"\0", 1)[0]


def _size(header: bytes) -> int:
    """The size in a header, as far as it is written in octal digits; else more than a block."""
    digits = header[124:136].strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else BLOCK + 1
