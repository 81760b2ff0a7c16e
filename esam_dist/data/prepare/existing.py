"""Shards that another program wrote: index them where they lie, so that they are read like our own."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from esam_dist.checksum import sha256
from esam_dist.data.dataset import DESCRIPTION
from esam_dist.data.decode import SUFFIXES
from esam_dist.data.prepare.write import write_description
from esam_dist.data.shards import ENTRY, Entries, ShardInfo, write_index
from esam_dist.errors import UserError

_REMEDY = "write the shard again"


def index_existing(out: Path) -> None:
    """Index the tars in `out/train` and `out/validation`, and describe them in `out/dataset.json`.

    Each sample is an image member and a `.cls` member with the same key. Raises UserError, naming shard and member,
    for a tar that is cut short, a key that is there twice or unsafe, and a label that is missing or no number.
    """
    if (out / DESCRIPTION).exists():
        raise UserError(f"OUT = {out}: has a {DESCRIPTION} already; delete it to index the shards anew")
    found: dict[str, list[tuple[Path, ShardInfo, Entries]]] = {}
    for split in ("train", "validation"):
        shards = sorted((out / split).glob("*.tar"))
        if not shards:
            raise UserError(f"OUT = {out}: has no shards {split}/*.tar; put the shards of both splits there")
        found[split] = [(shard, *index_shard(shard)) for shard in shards]
    num_classes = 1 + max(int(entries["label"].max()) for parts in found.values() for _, _, entries in parts)
    splits: dict[str, Any] = {}
    for split, parts in found.items():
        counts = sum(np.bincount(entries["label"], minlength=num_classes) for _, _, entries in parts)
        listed = [{"file": shard.name, "samples": info.samples, "sha256": info.sha256} for shard, info, _ in parts]
        splits[split] = {
            "samples": sum(info.samples for _, info, _ in parts),
            "left_out": 0,
            "class_counts": np.asarray(counts).tolist(),
            "shards": listed,
        }
    write_description(out, out.resolve().name, [str(label) for label in range(num_classes)], splits, {})


def index_shard(shard: Path) -> tuple[ShardInfo, Entries]:
    """Index one tar. Raises UserError."""
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _take(shard, tar, member, images, labels)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard}: is no tar, or cut short ({error}); {_REMEDY}") from None
    if not images:
        raise UserError(f"{shard}: holds no images; {_REMEDY}")
    if missing := set(images) ^ set(labels):
        raise UserError(f"{shard}: {min(missing)!r} has not both an image and a .cls; {_REMEDY}")
    rows = [(offset, length, labels[key], crc) for key, (offset, length, crc) in images.items()]
    info = ShardInfo(len(rows), shard.stat().st_size, sha256(shard))
    entries = np.array(rows, ENTRY)
    write_index(shard, info, entries)
    return info, entries


def _take(
    shard: Path,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    images: dict[str, tuple[int, int, int]],
    labels: dict[str, int],
) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{shard}: the member {member.name!r} points outside of its folder; {_REMEDY}")
    key, suffix = str(name.with_suffix("")), name.suffix.lower()
    if suffix not in SUFFIXES | {".cls"}:
        return
    if key in (labels if suffix == ".cls" else images):
        raise UserError(f"{shard}: the key {key!r} is there twice; {_REMEDY}")
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise UserError(f"{shard}: is cut short in {member.name!r}; {_REMEDY}")
    if suffix == ".cls":
        if not data.strip().isdigit() or int(data) >= 2**31:
            raise UserError(f"{shard}: {member.name!r} holds {data[:20]!r}, not a label; {_REMEDY}")
        labels[key] = int(data)
    else:
        images[key] = (member.offset_data, member.size, zlib.crc32(data))
