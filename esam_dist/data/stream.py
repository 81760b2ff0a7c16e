"""Shards behind URLs, without an index: webdataset draws them with replacement, for ever.

So ranks never run out at different times, but neither is every sample seen once per epoch, nor is resuming exact: a
resumed run goes on with shards drawn anew. Whoever can, should copy the shards and read them by their index.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tarfile
from collections.abc import Iterator
from random import Random
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from webdataset.tariterators import group_by_keys

from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import SUFFIXES, Pixels
from esam_dist.data.fetch import VARIABLE, FetchError, fetch, variables
from esam_dist.data.keys import DataKeys
from esam_dist.data.order import mix
from esam_dist.data.raw import AHEAD, MAX_BAD_IN_A_ROW, Raw, Ring, Skip
from esam_dist.data.samples import View, image_size
from esam_dist.data.tar import BROKEN, contents, label_of
from esam_dist.data.worker import outlive_stop
from esam_dist.errors import UserError

SHUFFLE_SAMPLES = 1000
MAX_LOST_SHARDS = 3
"""So many different shards in a row without a sample stop the run (or all, if there are fewer)."""

_STREAM = 31
_ABOUT_THE_SHARD = re.compile(r"__[^/]*__($|/)")
"""Names of files that webdataset takes for no part of a sample."""

Record = dict[str, Any]
"""A sample as webdataset passes it on: its files by suffix, its key and the URL of its shard."""


class Position(NamedTuple):
    """Where one rank enters the stream."""

    seed: int
    rank: int
    samples_seen: int
    num_samples: int
    samples_per_step: int


class StreamedBatches(IterableDataset[Raw]):
    """Batches of one rank, endless; each worker draws shards of its own."""

    def __init__(self, cfg: DataKeys, num_classes: int, at: Position) -> None:
        self._cfg, self._num_classes, self._at = cfg, num_classes, at
        self.workers = cfg.workers
        self._ring = Ring(cfg, cfg.workers)
        self._view = View(cfg, train=True)
        self._pattern = VARIABLE.sub(r"$\\{\1\\}", cfg.stream)  # webdataset would look up WDS_NAME, and show the value
        self._max_lost = min(MAX_LOST_SHARDS, len(set(webdataset.ResampledShards(self._pattern).urls)))

    def __iter__(self) -> Iterator[Raw]:
        """Batches; one without samples, but with the reasons, when shards or samples in a row are all bad."""
        worker = torch.utils.data.get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        at = self._at
        seed = int(mix(at.seed, _STREAM, at.rank, at.samples_seen, number)[0])
        samples = self._shuffled(seed)
        for step in itertools.count(number, num_workers):
            epoch = (at.samples_seen + step * at.samples_per_step) // at.num_samples
            # The DataLoader asks its workers in turn, so this is batch `step` to it.
            images = self._ring.images(step, self._cfg.batch_size, image_size(self._cfg, epoch))
            raw = self._batch(samples, images, int(mix(step, seed % 2**63)[0] >> np.uint64(1)))
            yield self._ring.sent(step, raw)

    def _batch(self, samples: Iterator[Record | Skip], images: Tensor, seed: int) -> Raw:
        batch_size, pixels = len(images), images.numpy()
        labels = torch.empty(batch_size, dtype=torch.int64)
        skips: list[Skip] = []
        keys: list[str] = []
        place = in_a_row = 0
        while place < batch_size and in_a_row < MAX_BAD_IN_A_ROW:
            sample = next(samples, None)
            if sample is None:
                break
            label = sample if isinstance(sample, Skip) else self._load(sample, seed + place, pixels[place])
            if isinstance(label, Skip):
                skips.append(label)
                # Shards are counted where they are drawn: it can take many to fill the buffer.
                in_a_row += label is not sample
            else:
                labels[place] = label
                keys.append(_name(cast(Record, sample)))
                place, in_a_row = place + 1, 0
        filled = batch_size if place == batch_size else 0
        return Raw(images[:filled], labels[:filled], seed, skips, place + len(skips), keys=tuple(keys[:filled]))

    def _load(self, sample: Record, seed: int, out: Pixels) -> int | Skip:
        """Fill one place of a batch; returns the label."""
        try:
            data, label = self._parts(sample)
            self._view(data, seed, out)
        except SampleError as bad:
            return Skip(_name(sample), bad.reason, bad.detail)
        return label

    def _parts(self, sample: Record) -> tuple[bytes, int]:
        text = sample.get("cls", b"")
        label = label_of(text)
        if label is None or label >= self._num_classes:
            raise SampleError("label", f"{text[:20]!r} is none of 0 to {self._num_classes - 1}")
        data = next((sample[suffix[1:]] for suffix in sorted(SUFFIXES) if suffix[1:] in sample), None)
        if not data:
            raise SampleError("empty", "holds no image")
        return data, label

    def _shuffled(self, seed: int) -> Iterator[Record | Skip]:
        """Samples of shards drawn with replacement, in a buffer's random order; what is lost comes at once.

        Endless, unless MAX_LOST_SHARDS different shards in a row give no sample.
        """
        random = Random(seed)
        buffer: list[Record] = []
        lost: set[str] = set()
        shards = webdataset.ResampledShards(self._pattern, seed=seed, deterministic=True, worker_seed=lambda: 0)
        for shard in shards:
            lost.add(shard["url"])
            for sample in self._shard(shard["url"]):
                if isinstance(sample, Skip):
                    yield sample
                    continue
                lost.clear()
                buffer.append(sample)
                if len(buffer) >= min(SHUFFLE_SAMPLES, self._cfg.stream_samples):
                    place = random.randrange(len(buffer))
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    yield buffer.pop()
            if len(lost) >= self._max_lost:
                return

    def _shard(self, url: str) -> Iterator[Record | Skip]:
        broken: list[Exception] = []

        def note(error: Exception) -> bool:
            broken.append(error)
            return True

        try:
            file = fetch(url, tries=self._cfg.stream_tries, cache=self._cfg.stream_cache)
        except FetchError as error:
            yield Skip(url, error.reason, str(error))
            return
        empty = True
        with file:
            for sample in group_by_keys(_members(url, file, broken), handler=note):
                empty = False
                # Of a key that comes twice nobody can tell which image has which label.
                yield Skip(f"{url}:{sample['__key__']}", "broken_shard", str(broken[0].args[0])) if broken else sample
                broken.clear()
        if broken or empty:
            yield Skip(url, "broken_shard", str(broken[0].args[0]) if broken else "holds no sample")


def _name(sample: Record) -> str:
    return f"{sample['__url__']}:{sample['__key__']}"


def _members(url: str, file: IO[bytes], broken: list[Exception]) -> Iterator[Record]:
    """The files of a tar as webdataset passes them on; what is wrong with it is added to `broken`."""
    try:
        for name, data in contents(file):
            if not _ABOUT_THE_SHARD.match(name):
                yield {"fname": name, "data": data, "__url__": url}
    except BROKEN as error:
        # It ends here: a sample of which a part was read comes after this, so that it is known as broken.
        broken.append(tarfile.ReadError(str(error) or type(error).__name__))


def check_stream(cfg: DataKeys) -> None:
    """Refuse a stream whose length is unknown, or that names no shard. Raises UserError."""
    if cfg.stream_samples < cfg.batch_size:
        raise UserError(
            f"data.stream_samples = {cfg.stream_samples}: data.stream needs the number of samples that count as an "
            "epoch, such as 1281167"
        )
    named = [variables(url) for url in cfg.stream.split("::")]
    unset = [name for values in named for name, value in values.items() if value is None]
    if unset:
        raise UserError(f"data.stream names ${{{unset[0]}}}, which is not in the environment; export it on every node")
    if cfg.stream.startswith("pipe:") and shutil.which(cfg.stream.removeprefix("pipe:").split()[0]) is None:
        raise UserError(f"data.stream = {cfg.stream!r}: there is no such command; install it or mend the URL")


def load_stream(batches: StreamedBatches, *, pin: bool) -> DataLoader[Any]:
    """Raw batches, filled by `data.workers` processes; for one iterator at a time (see Ring)."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=batches.workers,
        prefetch_factor=AHEAD if batches.workers else None,
        pin_memory=pin,
        worker_init_fn=outlive_stop,
        generator=torch.Generator(),
    )
