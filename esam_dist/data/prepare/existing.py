"""Shards that another program wrote: index them where they lie, so that they are read like our own."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from esam_dist.checksum import sha256
from esam_dist.data.dataset import DESCRIPTION, SPLITS, TEST, is_file_name
from esam_dist.data.decode import RESOURCE_FORK, SUFFIXES
from esam_dist.data.open_files import open_regular
from esam_dist.data.prepare.write import list_split, write_description
from esam_dist.data.shards import ENTRY, Entries, ShardInfo, write_index
from esam_dist.data.tar import Member, label_of, members
from esam_dist.errors import UserError

_REMEDY = "write the shard again"


def index_existing(out: Path, num_classes: int | None = None) -> None:
    """Index the tars in `out/train`, `out/validation` and, if it has any, `out/test`; describe them in `dataset.json`.

    Each sample is an image member and a `.cls` member with the same key. Raises UserError, naming shard and member,
    for a tar that is cut short, a key that is there twice or unsafe, and a label that is missing or no number. Labels
    must be below `num_classes`, or without it, be all from 0 to the highest.
    """
    if (out / DESCRIPTION).exists():
        raise UserError(f"OUT = {out}: has a {DESCRIPTION} already; delete it to index the shards anew")
    found: dict[str, list[tuple[Path, ShardInfo, Entries]]] = {}
    for split in (*SPLITS, TEST):
        shards = sorted((out / split).glob("*.tar"))
        if not shards and split == TEST:
            continue
        if not shards:
            raise UserError(f"OUT = {out}: has no shards {split}/*.tar; put the shards of both splits there")
        for shard in shards:
            if not is_file_name(shard.name):
                raise UserError(f"OUT = {out}: the shard {shard.name!r} has no name that can be printed; rename it")
        found[split] = [(shard, *index_shard(shard)) for shard in shards]
    num_classes = _num_classes([part for parts in found.values() for part in parts], num_classes)
    splits = {split: list_split(parts, num_classes, left_out=0) for split, parts in found.items()}
    write_description(out, out.resolve().name, [str(label) for label in range(num_classes)], splits, {})


def _num_classes(parts: Sequence[tuple[Path, ShardInfo, Entries]], given: int | None) -> int:
    """As many classes as are given, or as there are labels. Raises UserError, naming a shard, for labels that belie it.

    One wrong label would otherwise make a network of as many classes.
    """
    shard, _, entries = max(parts, key=lambda part: int(part[2]["label"].max()))
    highest = int(entries["label"].max())
    if given is not None:
        if highest >= given:
            raise UserError(
                f"--num-classes {given}: {shard} has the label {highest}; give more, or write the shard again"
            )
        return given
    missing = np.setdiff1d(np.arange(highest + 1), np.concatenate([rows["label"] for _, _, rows in parts]))
    if len(missing):
        raise UserError(
            f"{shard}: has the label {highest}, but no sample of any shard has the label {missing[0]}; number classes "
            "from 0 without gaps, or give --num-classes"
        )
    return highest + 1


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
    try:
        with open(shard, "rb", opener=open_regular) as file:
            for member in members(file):
                _take(shard, file, member, images, labels)
    except tarfile.ReadError as error:
        raise UserError(f"{shard}: is no tar, or {error}; {_REMEDY}") from None
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror}); {_REMEDY}") from None
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
        label = label_of(data)
        if label is None:
            raise UserError(f"{shard}: {member.name!r} holds {data[:20]!r}, not a label from 0 to 999999; {_REMEDY}")
        labels[key] = label
    else:
        images[key] = (member.offset, member.size, zlib.crc32(data))
