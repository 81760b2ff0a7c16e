"""What Weights & Biases wrote offline: LevelDB's log format, whose records its own protobuf classes parse."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.commands import wait_for

HEADER = 7  # ":W&B", a magic number, a version
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> list[Any]:
    """Every record of a `.wandb` file, whose writer, another process, may end a moment after the run."""
    wait_for(lambda: any(record.HasField("exit") for record in written(path)))
    return [*written(path)]


def written(path: Path) -> Iterator[Any]:
    """What is there by now; AssertionError where a checksum is wrong."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = HEADER, []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # filled with zeros, as a head needs so much
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        part = data[place + HEADER : place + HEADER + length]
        if len(part) < length:
            return
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind])))
        parts.append(part)
        if kind in (FULL, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []
        place += HEADER + length
