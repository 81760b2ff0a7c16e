"""The data as one rank sees it: torch's DataLoader over the shards, and a record of what had to be skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from esam_dist.data.dataset import Split, open_split, read_description
from esam_dist.data.device import Batch, Finish
from esam_dist.data.keys import DataKeys
from esam_dist.data.open_files import check_open_files
from esam_dist.data.order import Order, Picks, share
from esam_dist.data.raw import AHEAD, Raw, Ring
from esam_dist.data.samples import Samples
from esam_dist.data.stream import Position, StreamedBatches, check_stream, load_stream
from esam_dist.data.worker import outlive_stop
from esam_dist.errors import UserError

log = logging.getLogger(__name__)


class Skipped:
    """Counts the samples that a rank could not use, names each once, and stops the run when they are too many.

    Too many are more than e + 4 sqrt(e), where e is `data.max_skipped` of what the rank has read, but at least 1: so
    chance stops no rank of many, and no rank at its first bad samples.
    """

    def __init__(self, cfg: DataKeys, *, endless: bool) -> None:
        self._limit, self._key = cfg.max_skipped, "data.stream" if cfg.stream and endless else "data.path"
        self._endless, self._num_read = endless, 0
        self._named: set[str] = set()
        self.counts: dict[str, int] = {}

    def pass_on(self, raws: Iterable[Raw]) -> Iterator[Raw]:
        """The same batches, each taken note of. Raises UserError when too many samples are bad."""
        for raw in raws:
            self._num_read += raw.num_read
            for skip in raw.skips:
                self.counts[skip.reason] = self.counts.get(skip.reason, 0) + 1
                if skip.name not in self._named:
                    self._named.add(skip.name)
                    log.warning("skipped %s", skip.line())
            self._check(raw)
            if len(raw.labels):
                yield raw

    def _check(self, raw: Raw) -> None:
        if self._endless and len(raw.labels) == 0:
            raise UserError(
                f"{self._key}: no batch can be filled, {len(raw.skips)} samples or shards are bad, the last is "
                f"{raw.skips[-1].line()}; repair the data"
            )
        skipped = sum(self.counts.values())
        expected = max(self._limit * self._num_read, float(self._limit > 0.0))
        if skipped > expected + 4.0 * math.sqrt(expected):
            raise UserError(
                f"data.max_skipped = {self._limit:g}: {skipped} of {self._num_read} samples that this rank has read "
                f"cannot be used ({', '.join(sorted(self.counts))}); repair the data, or raise the limit"
            )


class TrainSource(NamedTuple):
    """Where training batches come from."""

    raws: Callable[[int], Iterable[Raw]]
    """Endless, from a global position on."""
    num_samples: int
    class_names: list[str]
    close: Callable[[], None] = lambda: None


class TrainData:
    """The training set as this rank sees it: an endless sequence of full batches from any global position."""

    def __init__(self, cfg: DataKeys, source: TrainSource, device: torch.device) -> None:
        self.num_samples, self.class_names = source.num_samples, source.class_names
        self.num_classes = len(source.class_names)
        self._source = source
        self._skipped = Skipped(cfg, endless=True)
        self._finish = Finish(cfg, device, self.num_classes, train=True)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples skipped on this rank so far, by reason."""
        return self._skipped.counts

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """Full batches, endless, from global position `samples_seen` on. Raises UserError for too many bad samples."""
        return self._finish(self._skipped.pass_on(self._source.raws(samples_seen)))

    def close(self) -> None:
        """Close the files; workers end with the iterator that started them."""
        self._source.close()


class ValidationData:
    """This rank's share of the validation set: over all ranks every sample exactly once."""

    def __init__(self, cfg: DataKeys, *, rank: int, world_size: int, device: torch.device) -> None:
        split = open_split(cfg.path, "validation")
        self.num_samples, self.num_classes = split.num_samples, len(split.class_names)
        self.most_batches = math.ceil(math.ceil(split.num_samples / world_size) / cfg.batch_size)
        """Of any rank in one pass."""
        ids = np.array(share(split.num_samples, rank, world_size), np.int64)
        parts = [ids[start : start + cfg.batch_size] for start in range(0, len(ids), cfg.batch_size)]
        picks = [Picks(part, np.zeros_like(part), np.zeros(len(part), np.uint64), 0) for part in parts]
        # Without a share there is no work.
        used = cfg if picks else cfg.model_copy(update={"workers": 0})
        self._raws = load(split, used, picks, train=False, pin=device.type == "cuda")
        self._skipped = Skipped(cfg, endless=False)
        self._finish = Finish(cfg, device, self.num_classes, train=False)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples skipped on this rank so far, by reason."""
        return self._skipped.counts

    def batches(self) -> Iterator[Batch]:
        """One pass over this rank's share; the last batch may be smaller, and bad samples are left out."""
        return self._finish(self._skipped.pass_on(self._raws))


def open_train(cfg: DataKeys, *, seed: int, rank: int, world_size: int, device: torch.device) -> TrainData:
    """Open the training data for one rank. Raises UserError, before anything is read, for whatever is wrong."""
    check_open_files(cfg.workers, "data.workers")
    if cfg.stream:
        return _open_stream(cfg, seed, rank, world_size, device)
    split = open_split(cfg.path, "train")
    if world_size * cfg.batch_size > split.num_samples:
        most = split.num_samples // world_size
        raise UserError(
            f"data.batch_size = {cfg.batch_size} on {world_size} ranks needs {world_size * cfg.batch_size} samples a "
            f"step, but {cfg.path} has {split.num_samples}; use at most {most}, or fewer ranks"
        )
    order = Order(seed, split.counts, cfg.shuffle_window, cfg.repeats)

    def raws(samples_seen: int) -> DataLoader[Any]:
        picks = order.batches(samples_seen, batch_size=cfg.batch_size, rank=rank, world_size=world_size)
        return load(split, cfg, picks, train=True, pin=device.type == "cuda")

    return TrainData(cfg, TrainSource(raws, split.num_samples, split.class_names, split.close), device)


def _open_stream(cfg: DataKeys, seed: int, rank: int, world_size: int, device: torch.device) -> TrainData:
    check_stream(cfg)
    class_names = read_description(cfg.path).classes

    def raws(samples_seen: int) -> DataLoader[Any]:
        at = Position(seed, rank, samples_seen, cfg.stream_samples, world_size * cfg.batch_size)
        return load_stream(StreamedBatches(cfg, len(class_names), at), pin=device.type == "cuda")

    return TrainData(cfg, TrainSource(raws, cfg.stream_samples, class_names), device)


def open_validation(cfg: DataKeys, *, rank: int, world_size: int, device: torch.device) -> ValidationData:
    """Open the validation split for one rank. Raises UserError for whatever is wrong."""
    check_open_files(cfg.workers, "data.workers")
    return ValidationData(cfg, rank=rank, world_size=world_size, device=device)


class _Numbered:
    """The picks of every pass, counted from 0."""

    def __init__(self, picks: Iterable[Picks]) -> None:
        self._picks = picks

    def __iter__(self) -> Iterator[tuple[int, Picks]]:
        return enumerate(self._picks)


def load(split: Split, cfg: DataKeys, picks: Iterable[Picks], *, train: bool, pin: bool) -> DataLoader[Any]:
    """Raw batches of `picks`, in order, filled by `data.workers` processes; for one iterator at a time (see Ring)."""
    workers = cfg.workers
    return DataLoader(
        Samples(split, cfg, Ring(cfg, workers), train=train),  # type: ignore[arg-type]  # whole picks in, whole batches out
        batch_sampler=_Numbered(picks),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=_as_is,
        pin_memory=pin,
        worker_init_fn=outlive_stop,
        # Validation comes again and again: its workers stay.
        persistent_workers=not train and workers > 0,
        # Without its own, every iterator would draw from the generator that dropout uses.
        generator=torch.Generator(),
    )


def _as_is(raw: Any) -> Any:
    return raw
