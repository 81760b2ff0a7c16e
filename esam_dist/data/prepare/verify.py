"""Verify a prepared dataset: counts, checksums, labels, and that every image can be decoded."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from esam_dist.checksum import sha256
from esam_dist.data.dataset import SPLITS, Description, SampleError, Split, open_split, read_description
from esam_dist.data.decode import check_image
from esam_dist.data.prepare.existing import scan_shard
from esam_dist.data.prepare.processes import results
from esam_dist.data.shards import read_index
from esam_dist.errors import UserError

log = logging.getLogger(__name__)

_SAID = 20


def verify(root: Path, *, workers: int = 0) -> int:
    """Check everything; returns the number of samples. Raises UserError that counts and names what is wrong."""
    total, faults = 0, []
    description = read_description(root)
    for name in (*SPLITS, *(name for name in description.splits if name not in SPLITS)):
        split = open_split(root, name)
        total += split.num_samples
        for found in results(partial(shard_faults, split), range(len(split.shards)), workers):
            faults += found
    for fault in faults[:_SAID]:
        log.warning("%s", fault)
    if faults:
        raise UserError(
            f"{root}: {len(faults)} faults in {total} samples, the first: {faults[0]}; {_remedy(root, description)}"
        )
    log.info("%s: %d samples verified", root, total)
    return total


def _remedy(root: Path, description: Description) -> str:
    if not description.plan:
        return "write these shards again, without what is named, and index them anew"
    # What is finished is kept, so that to prepare again into the same folder would change nothing.
    return f"delete {root} and prepare the data again: images that cannot be decoded are left out, and named"


def shard_faults(split: Split, number: int) -> list[str]:
    """What is wrong in one shard: a line for each fault."""
    shard, start = split.shards[number], sum(split.counts[:number])
    info, entries = read_index(shard)
    if sha256(shard) != info.sha256:
        return [f"{shard}: its checksum is not that of its index"]
    faults = []
    try:
        if scan_shard(shard).tobytes() != entries.tobytes():
            faults.append(f"{shard}: its images or labels are not those of its index")
    except UserError as error:
        faults.append(str(error))
    for sample in range(start, start + info.samples):
        try:
            check_image(split.read(sample))
        except SampleError as bad:
            faults.append(f"{split.describe(sample)}: {bad.reason} {bad.detail}")
    split.close()
    return faults
