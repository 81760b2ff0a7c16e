"""A prepared dataset on disk: `dataset.json` at the root, and one folder of shards per split."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from esam_dist.data.open_files import num_free, open_regular, read_regular
from esam_dist.data.shards import Entries, read_around, read_index
from esam_dist.data.tar import BLOCK, member_name
from esam_dist.errors import UserError

DESCRIPTION = "dataset.json"
SPLITS = ("train", "validation")
"""What every dataset has."""
TEST = "test"
"""A split that some have: never trained on, and no checkpoint is chosen by it."""
_OPEN_FILES = 64


class SampleError(Exception):
    """A sample that cannot be used: `reason` is a short word for the counters, the message is for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class ListedShard(BaseModel):
    """What `dataset.json` says of one shard."""

    file: str
    samples: int
    sha256: str


class ListedSplit(BaseModel):
    """What `dataset.json` says of one split; `left_out` counts samples of the source that could not be used."""

    samples: int
    left_out: int
    class_counts: list[int]
    shards: list[ListedShard]


class Description(BaseModel):
    """The contents of `dataset.json`; `plan` is what the shards were written from, for a restart to compare."""

    format: Literal[2]
    name: str
    classes: list[str]
    splits: dict[str, ListedSplit]
    plan: dict[str, Any]


def read_description(root: Path) -> Description:
    """The contents of `root/dataset.json`. Raises UserError when there is none, or another program wrote it."""
    path = root / DESCRIPTION
    if not root.is_dir():
        raise UserError(f"data.path = {root}: no such folder; write it with `esam-dist prepare SOURCE {root}`")
    try:
        return Description.model_validate_json(read_regular(path))
    except OSError:
        raise UserError(
            f"data.path = {root}: has no {DESCRIPTION}; write it with `esam-dist prepare SOURCE {root}`"
        ) from None
    except ValueError:
        raise UserError(
            f"data.path = {root}: {path} is damaged, or of another version; prepare the data again"
        ) from None


@dataclass
class Split:
    """The samples of one split, numbered through its shards; `read` fetches one by a single `pread`.

    Shards stay open (the most recent few), so a shard that is renamed away under a running job goes on being read;
    one that is overwritten fails its checksums.
    """

    name: str
    class_names: list[str]
    shards: list[Path]
    counts: list[int]
    entries: Entries

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *self.counts])
        self._files: OrderedDict[int, int] = OrderedDict()
        # The rest is for others, such as the validation's own, and the workers'.
        self._most_open = min(_OPEN_FILES, max(1, num_free() // 4))

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return len(self.entries)

    def label(self, sample: int) -> int:
        """The label of a sample."""
        return int(self.entries["label"][sample])

    def read(self, sample: int) -> bytes:
        """The image file of a sample, checked against the index. Raises SampleError."""
        entry = self.entries[sample]
        try:
            around = read_around(self._file(sample), entry)
        except OSError as error:
            raise SampleError("unreadable", str(error.strerror)) from None
        if not around.image:
            raise SampleError("empty")
        if zlib.crc32(around.image) != entry["crc32"]:
            raise SampleError("checksum", "its bytes are not those that were indexed")
        if other := around.other_label(entry):
            raise SampleError("label", f"the index says {entry['label']}, the shard {other[:20]!r}")
        return around.image

    def describe(self, sample: int) -> str:
        """Shard and member name of a sample, for the log."""
        shard = self.shards[self._shard(sample)]
        try:
            name = member_name(os.pread(self._file(sample), BLOCK, int(self.entries["offset"][sample]) - BLOCK))
        except OSError:
            name = f"sample {sample}"
        return f"{shard}:{name}"

    def close(self) -> None:
        """Close the shards that are open in this process."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _file(self, sample: int) -> int:
        shard = self._shard(sample)
        if shard not in self._files:
            if len(self._files) >= self._most_open:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = open_regular(self.shards[shard])
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open their own files.
        return {**self.__dict__, "_files": OrderedDict()}


def open_split(root: Path, name: str) -> Split:
    """Open the split `name` of the dataset at `root`, checking every shard against its index. Raises UserError."""
    description = read_description(root)
    listed = description.splits.get(name)
    if listed is None and name == TEST:
        raise UserError(
            f"data.path = {root}: has no split {name!r}; prepare a folder that has {name}/ beside train/ and val/, or "
            "score the validation split"
        )
    if listed is None or not listed.shards:
        raise UserError(f"data.path = {root}: {DESCRIPTION} lists no shards for the split {name!r}; prepare it again")
    _check_listed(root, listed.shards)
    shards = [root / name / shard.file for shard in listed.shards]
    infos, entries = zip(*(read_index(shard) for shard in shards), strict=True)
    for shard, info, entry in zip(shards, infos, listed.shards, strict=True):
        if (info.sha256, info.samples) != (entry.sha256, entry.samples):
            raise UserError(f"data.path: {shard} is not the shard that {DESCRIPTION} lists; prepare the data again")
    _check_labels(shards, entries, len(description.classes))
    joined = np.concatenate(entries)
    counts = np.bincount(joined["label"], minlength=len(description.classes)).tolist()
    if counts != listed.class_counts or listed.samples != len(joined):
        raise UserError(
            f"data.path = {root}: samples or class_counts of {DESCRIPTION} are not those of the shards of {name}; "
            "prepare the data again"
        )
    return Split(name, description.classes, shards, [info.samples for info in infos], joined)


def _check_listed(root: Path, listed: Sequence[ListedShard]) -> None:
    """Refuse what is no name of a file in the split's folder, and a shard that is listed twice."""
    seen: dict[str, str] = {}
    for shard in listed:
        if not is_file_name(shard.file):
            raise UserError(
                f"data.path = {root}: {DESCRIPTION} lists {shard.file[:80]!r}, which is no name of a shard; prepare "
                "the data again"
            )
        for told in (shard.file, shard.sha256):
            if told in seen:
                raise UserError(
                    f"data.path = {root}: {DESCRIPTION} lists the same shard twice, {seen[told]} and {shard.file}; "
                    "prepare the data again"
                )
            seen[told] = shard.file


def is_file_name(name: str) -> bool:
    """Whether `name` can be that of a file in a folder, and be printed."""
    return name.isprintable() and name == Path(name).name not in ("", "..") and len(name.encode()) <= 255


def _check_labels(shards: list[Path], entries: tuple[Entries, ...], num_classes: int) -> None:
    for shard, rows in zip(shards, entries, strict=True):
        wrong = rows["label"][(rows["label"] < 0) | (rows["label"] >= num_classes)]
        if len(wrong):
            raise UserError(
                f"data.path: {shard} holds the label {wrong[0]}, outside 0 to {num_classes - 1}; prepare the data again"
            )
