"""Small archives, which are read whole: so gzip's own checksum is checked too."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from esam_dist.data.tar import members
from esam_dist.errors import UserError

_GZIP = b"\x1f\x8b"


def read_whole(path: Path) -> bytes:
    """The contents of a file, decompressed if it is gzip's. Raises UserError when it is damaged or cut short."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--from {path}: is damaged or cut short ({error}); get it again") from None


def read_files(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The files named `wanted`, from the folder or tar archive (plain or gzip's) at `path`. Raises UserError."""
    if not path.exists():
        raise UserError(f"--from {path}: no such file or folder; give that which holds {min(wanted)!r}")
    if path.is_dir():
        found = {file.name: read_whole(file) for file in path.rglob("*") if file.name in wanted and file.is_file()}
    else:
        found = _from_tar(path, wanted)
    if missing := set(wanted) - set(found):
        raise UserError(f"--from {path}: has no file {min(missing)!r}; get it again, and whole")
    return found


def _from_tar(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    found = {}
    file = io.BytesIO(read_whole(path))
    try:
        for member in members(file):
            name = PurePosixPath(member.name).name
            if name in wanted:
                file.seek(member.offset)
                found[name] = file.read(member.size)
    except tarfile.ReadError as error:
        raise UserError(f"--from {path}: is no tar archive, or {error}; get it again") from None
    return found
