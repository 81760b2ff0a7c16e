"""Shards: plain webdataset tars with a sidecar index, so that a sample is one `pread`.

`shard-000000.tar` holds `NNNNNN.jpg` (or `.png`) and `NNNNNN.cls` for every sample. `shard-000000.index` holds one line
of JSON (size, checksum and number of samples of the tar, checksum of the entries), then one `ENTRY` per sample. A shard
is finished when its index exists: the index is renamed into place last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esam_dist.checksum import sha256
from esam_dist.data.open_files import open_regular, read_regular
from esam_dist.data.tar import BLOCK, in_blocks, label_beside, label_of
from esam_dist.errors import UserError
from esam_dist.files import replacing, write_file

ENTRY = np.dtype([("offset", "<i8"), ("length", "<i4"), ("label", "<i4"), ("crc32", "<u4")])
"""Where the image's bytes lie in the tar, their checksum, and the sample's label."""

Entries = NDArray[Any]

_BODY = "entries_sha256"


class Sample(NamedTuple):
    """One labelled image file."""

    image: bytes
    suffix: str
    label: int


@dataclass(frozen=True)
class ShardInfo:
    """What the index says of its shard as a whole."""

    samples: int
    bytes: int
    sha256: str


def index_path(shard: Path) -> Path:
    """The sidecar of `shard`."""
    return shard.with_suffix(".index")


def write_shard(path: Path, samples: Iterable[Sample], first_key: int) -> ShardInfo:
    """Write `samples` as a tar and its index, keys counting from `first_key`: same samples, same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    with replacing(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in enumerate(samples, first_key):
                offset = _add(tar, f"{key:06d}.{sample.suffix}", sample.image)
                _add(tar, f"{key:06d}.cls", str(sample.label).encode())
                entries.append((offset, len(sample.image), sample.label, zlib.crc32(sample.image)))
        file.flush()
        info = ShardInfo(len(entries), file.tell(), sha256(Path(file.name)))
    write_index(path, info, np.array(entries, ENTRY))
    return info


def finished(path: Path) -> ShardInfo | None:
    """What the index says of the shard at `path`, if both are there and belong together."""
    try:
        return read_index(path)[0]
    except UserError:
        return None


def write_index(shard: Path, info: ShardInfo, entries: Entries) -> None:
    """Write the sidecar of `shard`, in one move."""
    body = entries.tobytes()
    line = json.dumps(asdict(info) | {_BODY: hashlib.sha256(body).hexdigest()})
    write_file(index_path(shard), line.encode() + b"\n" + body)


def read_index(shard: Path) -> tuple[ShardInfo, Entries]:
    """The index of `shard`. Raises UserError when it is missing or damaged, or does not match the shard."""
    path = index_path(shard)
    try:
        line, _, body = read_regular(path).partition(b"\n")
        size = shard.stat().st_size
    except OSError as error:
        missing = path if error.filename == str(path) else shard
        raise UserError(f"data.path: {missing} cannot be read ({error.strerror}); prepare the data again") from None
    try:
        head = parsed(line)
        if head.pop(_BODY) != hashlib.sha256(body).hexdigest():
            raise ValueError
        info = ShardInfo(**head)
        if not (type(info.samples) is type(info.bytes) is int and 0 <= info.samples < 2**31):
            raise ValueError
        entries = np.frombuffer(body, ENTRY)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"data.path: {path} is damaged; delete it and prepare the data again") from None
    if info.samples == 0 or len(entries) != info.samples:
        raise UserError(f"data.path: {path} lists {len(entries)} samples of {info.samples}; prepare the data again")
    if size != info.bytes or not _lie_within(entries, size) or not _headers_match(shard, entries[[0, -1]]):
        raise UserError(f"data.path: {path} does not match {shard.name} ({size} bytes); prepare the data again")
    return info, entries


class Around(NamedTuple):
    """An image in a shard, and what lies beside it."""

    before: bytes
    image: bytes
    after: bytes

    @property
    def header(self) -> bytes:
        """The image's own header."""
        return self.before[-BLOCK:]

    def other_label(self, entry: Any) -> bytes:
        """What the image's `.cls` holds, if it lies beside it and is not what the index says; else nothing."""
        told = label_beside(self.before, self.after)
        return b"" if told is None or label_of(told) == entry["label"] else told or b"?"


def read_around(file: int, entry: Any) -> Around:
    """The image of an index's entry with its neighbours, by one `pread`. Raises OSError."""
    offset, length = int(entry["offset"]), int(entry["length"])
    start, end = min(offset, 3 * BLOCK), in_blocks(length)
    data = os.pread(file, start + end + 2 * BLOCK, offset - start)
    return Around(data[:start], data[start : start + length], data[start + end :])


def parsed(text: bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also where it is nested deeper than can be parsed."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    # TarInfo's defaults (mtime 0, uid 0, mode 644) keep the bytes the same on every machine.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + BLOCK
    tar.addfile(info, io.BytesIO(data))
    return offset


def _lie_within(entries: Entries, size: int) -> bool:
    """Whether all images lie in a tar of so many bytes, each behind a header."""
    offsets, lengths = entries["offset"], entries["length"]
    inside = (offsets >= BLOCK) & (offsets <= size) & (lengths >= 0) & (lengths <= size - offsets)
    return bool((inside & (offsets % BLOCK == 0)).all())


def _headers_match(shard: Path, entries: Entries) -> bool:
    """Whether each of `entries` has its size in the tar header before it, and its label in the `.cls` beside it."""
    with open(shard, "rb", opener=open_regular) as file:
        for entry in entries:
            around = read_around(file.fileno(), entry)
            try:
                header = tarfile.TarInfo.frombuf(around.header, "ascii", "replace")
            except tarfile.HeaderError:
                return False
            if header.size != entry["length"] or header.name.lower().endswith(".cls") or around.other_label(entry):
                return False
    return True
