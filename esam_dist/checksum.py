"""SHA-256 of a file, by which shards and checkpoints are checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path


def sha256(path: Path, before_block: Callable[[], None] = lambda: None) -> str:
    """The checksum of a file, in hexadecimal. What `before_block` raises ends it early."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            before_block()
            digest.update(block)
    return digest.hexdigest()
