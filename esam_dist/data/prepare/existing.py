"""Shards that another program wrote: index them where they lie, so that they are read like our own."""

from __future__ import annotations

import re
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from esam_dist.checksum import sha256
from esam_dist.data.dataset import DESCRIPTION, SPLITS
from esam_dist.data.decode import RESOURCE_FORK, SUFFIXES
from esam_dist.data.prepare.write import list_split, write_description
from esam_dist.data.shards import ENTRY, Entries, ShardInfo, write_index
from esam_dist.data.tar import Member, members
from esam_dist.errors import UserError

_REMEDY = "write the shard again"
_LABEL = re.compile(rb"\s*0*(\d{1,6})\s*")


def index_existing(out: Path) -> None:
    """Index the tars in `out/train` and `out/validation`, and describe them in `out/dataset.json`.

    Each sample is an image member and a `.cls` member with the same key. Raises UserError, naming shard and member,
    for a tar that is cut short, a key that is there twice or unsafe, and a label that is missing or no number.
    """
    if (out / DESCRIPTION).exists():
        raise UserError(f"OUT = {out}: has a {DESCRIPTION} already; delete it to index the shards anew")
    found: dict[str, list[tuple[Path, ShardInfo, Entries]]] = {}
    for split in SPLITS:
        shards = sorted((out / split).glob("*.tar"))
        if not shards:
            raise UserError(f"OUT = {out}: has no shards {split}/*.tar; put the shards of both splits there")
        found[split] = [(shard, *index_shard(shard)) for shard in shards]
    num_classes = 1 + max(int(entries["label"].max()) for parts in found.values() for _, _, entries in parts)
    splits = {split: list_split(parts, num_classes, left_out=0) for split, parts in found.items()}
    write_description(out, out.resolve().name, [str(label) for label in range(num_classes)], splits, {})


def index_shard(shard: Path) -> tuple[ShardInfo, Entries]:
    """Index one tar. Raises UserError."""
    entries = scan_shard(shard)
    info = ShardInfo(len(entries), shard.stat().st_size, sha256(shard))
    write_index(shard, info, entries)
    return info, entries


def scan_shard(shard: Path) -> Entries:
    """The samples of a tar, in the order of their images. Raises UserError."""
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    with shard.open("rb") as file:
        try:
            for member in members(file):
                _take(shard, file, member, images, labels)
        except tarfile.ReadError as error:
            raise UserError(f"{shard}: is no tar, or {error}; {_REMEDY}") from None
    if not images:
        raise UserError(f"{shard}: holds no images; {_REMEDY}")
    if missing := set(images) ^ set(labels):
        raise UserError(f"{shard}: {min(missing)!r} has not both an image and a .cls; {_REMEDY}")
    return np.array([(offset, length, labels[key], crc) for key, (offset, length, crc) in images.items()], ENTRY)


def _take(
    shard: Path,
    file: IO[bytes],
    member: Member,
    images: dict[str, tuple[int, int, int]],
    labels: dict[str, int],
) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{shard}: the member {member.name!r} points outside of its folder; {_REMEDY}")
    key, suffix = str(name.with_suffix("")), name.suffix.lower()
    if suffix not in SUFFIXES | {".cls"} or name.name.startswith(RESOURCE_FORK):
        return
    if key in (labels if suffix == ".cls" else images):
        raise UserError(f"{shard}: the key {key!r} is there twice; {_REMEDY}")
    file.seek(member.offset)
    data = file.read(member.size)
    if suffix == ".cls":
        label = _LABEL.fullmatch(data)
        if label is None:
            raise UserError(f"{shard}: {member.name!r} holds {data[:20]!r}, not a label from 0 to 999999; {_REMEDY}")
        labels[key] = int(label[1])
    else:
        images[key] = (member.offset, member.size, zlib.crc32(data))
