"""A prepared dataset: the first byte says which of its files the rest is, and whether its checksums are mended."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from esam_dist.data.dataset import DESCRIPTION, Description, ListedShard, ListedSplit, SampleError, open_split
from esam_dist.data.shards import Sample, ShardInfo, index_path, parsed, read_index, write_index, write_shard
from esam_dist.errors import UserError

CHECKSUM = "entries_sha256"


class DatasetTarget:
    """See the module. Every sample of what is taken is read."""

    allowed = (UserError, SampleError)
    modules = ("data/dataset.py", "data/shards.py")
    memory_bytes = 1 << 29

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._shard = folder / "train" / "shard-000000.tar"
        samples = [Sample(b"image %d" % number * 50, "jpg", number % 2) for number in range(3)]
        info = write_shard(self._shard, samples, 0)
        self._entries = read_index(self._shard)[1]
        self._tar, self._index = self._shard.read_bytes(), index_path(self._shard).read_bytes()
        self._describe(info)
        self._description = (folder / DESCRIPTION).read_bytes()

    def seeds(self) -> list[bytes]:
        """The files as they are written."""
        return [
            *(b"\0" + self._description, b"\1" + self._index, b"\2" + self._index, b"\3" + self._tar),
            b'\0{"format": 2, "splits": {"train": []}}',
            b"\2" + b"[" * 2000 + b"\n",
        ]

    def run(self, data: bytes) -> None:
        """See `Target`."""
        kind, body = (data[0] if data else 0) % 4, data[1:]
        self._shard.write_bytes(body if kind == 3 else self._tar)
        index_path(self._shard).write_bytes(self._index)
        (self._root / DESCRIPTION).write_bytes(body if kind == 0 else self._description)
        if kind in (1, 2):
            index_path(self._shard).write_bytes(body if kind == 1 else _mended(body))
        if kind == 3:
            info = ShardInfo(len(self._entries), len(body), hashlib.sha256(body).hexdigest())
            write_index(self._shard, info, self._entries)
            self._describe(info)
        split = open_split(self._root, "train")
        try:
            for sample in range(min(split.num_samples, 100)):
                assert 0 <= split.label(sample) < len(split.class_names)
                assert split.describe(sample).isprintable()
                split.read(sample)
        finally:
            split.close()

    def _describe(self, info: ShardInfo) -> None:
        listed = ListedShard(file=self._shard.name, samples=info.samples, sha256=info.sha256)
        split = ListedSplit(samples=info.samples, left_out=0, class_counts=[2, 1], shards=[listed])
        description = Description(format=2, name="few", classes=["a", "b"], splits={"train": split}, plan={})
        (self._root / DESCRIPTION).write_text(description.model_dump_json())


def _mended(index: bytes) -> bytes:
    """`index` with the checksum of its own entries."""
    line, newline, body = index.partition(b"\n")
    try:
        head = parsed(line)
    except ValueError:
        return index
    if not isinstance(head, dict):
        return index
    head[CHECKSUM] = hashlib.sha256(body).hexdigest()
    return json.dumps(head).encode() + newline + body
