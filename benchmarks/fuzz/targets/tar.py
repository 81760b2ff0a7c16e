"""The reader of tars, plain or compressed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from benchmarks.fuzz.targets.packed import PACKED, tar_of, unpacked
from esam_dist.data.tar import BLOCK, BROKEN, check_whole, contents, label_beside, label_of, member_name


class TarTarget:
    """The first byte says how the rest is packed before it is read; a whole tar's contents are all there."""

    allowed = BROKEN
    modules = ("data/tar.py",)
    memory_bytes = 1 << 30

    def __init__(self, _: Path) -> None:
        pass

    def seeds(self) -> list[bytes]:
        """In every format, and packed in every way."""
        files = {"0.png": b"image", "0.cls": b"1", "a" * 150 + ".png": bytes(600), "b/" * 60 + "x.cls": b"007"}
        tars = [
            tar_of(files if kind != tarfile.USTAR_FORMAT else {"0.jpg": b"x" * 513, "0.cls": b"2"}, kind)
            for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        ]
        return [bytes([how]) + tar for how in range(len(PACKED)) for tar in tars]

    def run(self, data: bytes) -> None:
        """See `Target`."""
        packed = unpacked(data)
        before, after = packed[: 3 * BLOCK], packed[3 * BLOCK : 5 * BLOCK]
        assert member_name(before[:BLOCK]).isprintable()
        told = label_beside(before, after)
        assert told is None or len(told) <= BLOCK
        label = label_of(told or packed[:20])
        assert label is None or 0 <= label <= 999_999
        found = list(contents(io.BytesIO(packed)))
        check_whole(io.BytesIO(packed))
        assert all(isinstance(name, str) and isinstance(content, bytes) for name, content in found)
