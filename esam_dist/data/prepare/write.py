"""Write a source as shards, in parallel and restartable: the same source and plan give the same bytes.

Samples are shuffled by the seed first, so that every shard is a fair mix. A shard is one job; a shard whose index is
there is done, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from esam_dist.data.dataset import DESCRIPTION, Description, ListedShard, ListedSplit, SampleError
from esam_dist.data.open_files import read_regular
from esam_dist.data.order import mix
from esam_dist.data.prepare.encode import Encoding
from esam_dist.data.prepare.processes import results
from esam_dist.data.prepare.source import Source
from esam_dist.data.raw import Skip
from esam_dist.data.shards import (
    Entries,
    Sample,
    ShardInfo,
    finished,
    parsed,
    read_index,
    write_shard,
)
from esam_dist.errors import UserError
from esam_dist.files import remove_partial, write_file

log = logging.getLogger(__name__)

PLAN = "prepare.json"
_ORDER = 11
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """What determines the bytes of a prepared dataset, besides its source."""

    seed: int = 0
    samples_per_shard: int = 1024
    encoding: Encoding = field(default_factory=Encoding)


class ShardJob(NamedTuple):
    """One shard to write: which samples, in which order."""

    split: str
    number: int
    samples: list[int]
    first_key: int

    def path(self, out: Path) -> Path:
        """Where the shard goes."""
        return out / self.split / f"shard-{self.number:06d}.tar"


def write_dataset(source: Source, out: Path, plan: Plan, *, workers: int = 0) -> None:
    """Write every split of `source` below `out`, and `dataset.json` last; `workers` 0 writes in this process.

    Raises UserError when `out` holds something else, or a shard would be empty.
    """
    fingerprint = {"source": source.name, "digest": source.digest, **asdict(plan)}
    _claim(out, fingerprint)
    jobs = [job for split in source.labels for job in _jobs(source, split, plan)]
    waiting = [job for job in jobs if finished(job.path(out)) is None]
    if len(waiting) < len(jobs):
        log.info("%s: %d of %d shards are there already", out, len(jobs) - len(waiting), len(jobs))
    _write_all(source, out, plan, waiting, workers)
    _describe(source, out, jobs, fingerprint)
    for folder in (out, *(out / split for split in source.labels)):
        remove_partial(folder)
    (out / PLAN).unlink(missing_ok=True)


def _claim(out: Path, fingerprint: dict[str, Any]) -> None:
    """Note in `out` what is being written; refuse a folder that something else was written to."""
    for name in (PLAN, DESCRIPTION):
        if (out / name).exists():
            try:
                held = parsed(read_regular(out / name))
                held = held if name == PLAN else held.get("plan")
            except (OSError, ValueError, AttributeError):
                held = None
            if held != fingerprint:
                raise UserError(f"OUT = {out}: holds data prepared otherwise ({name}); delete it or choose another")
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / PLAN, json.dumps(fingerprint))


def _jobs(source: Source, split: str, plan: Plan) -> Iterator[ShardJob]:
    num_samples = len(source.labels[split])
    if num_samples == 0:
        raise UserError(f"{source.name}: the split {split!r} is empty; give more images or another share")
    order = np.argsort(mix(plan.seed, _ORDER, np.arange(num_samples)))
    first_key = 0
    for number, part in enumerate(np.array_split(order, -(-num_samples // plan.samples_per_shard))):
        yield ShardJob(split, number, part.tolist(), first_key)
        first_key += len(part)


def _write_all(source: Source, out: Path, plan: Plan, jobs: list[ShardJob], workers: int) -> None:
    with Progress(sum(len(job.samples) for job in jobs)) as progress:
        for num_samples in results(partial(_write, source, out, plan.encoding), jobs, workers):
            progress.add(num_samples)


def _write(source: Source, out: Path, encoding: Encoding, job: ShardJob) -> int:
    info = write_shard(job.path(out), _samples(source, encoding, job), job.first_key)
    if info.samples == 0:
        raise UserError(f"{source.name}: no image of {job.path(out).name} ({job.split}) can be read; repair the source")
    return len(job.samples)


def _samples(source: Source, encoding: Encoding, job: ShardJob) -> Iterator[Sample]:
    for sample in job.samples:
        try:
            image, suffix = encoding(*source.read(job.split, sample))
        except SampleError as bad:
            log.warning("left out %s", Skip(source.describe(job.split, sample), bad.reason, bad.detail).line())
            continue
        yield Sample(image, suffix, source.labels[job.split][sample])


def _describe(source: Source, out: Path, jobs: list[ShardJob], fingerprint: dict[str, Any]) -> None:
    splits = {}
    for split in source.labels:
        own = [job for job in jobs if job.split == split]
        parts = [(job.path(out), *read_index(job.path(out))) for job in own]
        left_out = sum(len(job.samples) for job in own) - sum(info.samples for _, info, _ in parts)
        splits[split] = list_split(parts, len(source.class_names), left_out=left_out)
        if left_out:
            log.warning(
                "%s: %d of %d images of %s were left out", out, left_out, sum(len(job.samples) for job in own), split
            )
    write_description(out, source.name, list(source.class_names), splits, fingerprint)


def list_split(parts: Sequence[tuple[Path, ShardInfo, Entries]], num_classes: int, *, left_out: int) -> ListedSplit:
    """What `dataset.json` shall say of a split with these shards."""
    labels = np.concatenate([entries["label"] for _, _, entries in parts])
    return ListedSplit(
        samples=len(labels),
        left_out=left_out,
        class_counts=np.bincount(labels, minlength=num_classes).tolist(),
        shards=[ListedShard(file=path.name, samples=info.samples, sha256=info.sha256) for path, info, _ in parts],
    )


def write_description(
    out: Path, name: str, class_names: list[str], splits: dict[str, ListedSplit], plan: dict[str, Any]
) -> None:
    """Write `dataset.json`, in one move."""
    description = Description(format=2, name=name, classes=class_names, splits=splits, plan=plan)
    write_file(out / DESCRIPTION, json.dumps(description.model_dump(), indent=1) + "\n")


class Progress:
    """How far, how fast, how long still, of images: a bar on a terminal, a log line every few seconds elsewhere."""

    def __init__(self, total: int, *, no_bar: bool = False) -> None:
        self._bar = tqdm(total=total, unit="img", disable=no_bar or None)
        self._total, self._done, self._start, self._said = total, 0, time.monotonic(), time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_samples: int) -> None:
        """Count samples that are written."""
        self._done += num_samples
        self._bar.update(num_samples)
        now = time.monotonic()
        if self._bar.disable and (now - self._said > _REPORT_SECONDS or self._done == self._total):
            self._said = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate
            log.info("%d of %d images, %.0f images/s, %.0f s left", self._done, self._total, rate, left)
