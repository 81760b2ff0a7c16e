"""Workers write batches into slots of shared memory: nobody may overwrite what is still in use."""

import pickle
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from esam_dist.data import open_train, open_validation
from esam_dist.data.dataset import open_split
from esam_dist.data.keys import DataKeys
from esam_dist.data.loader import load
from esam_dist.data.order import Order
from esam_dist.data.raw import AHEAD, MAX_BAD_IN_A_ROW, Raw, Ring, Skip
from esam_dist.data.stream import Position, StreamedBatches, load_stream
from esam_dist.errors import UserError
from tests.unit.test_data_loader import corrupt

CPU = torch.device("cpu")
PAUSE_SECONDS = 0.03
"""Longer than workers take for all that is ordered from them: whatever they may overwrite, they have."""


def settings(path: Path, **values) -> DataKeys:
    return DataKeys(**{"path": path, "batch_size": 8, "image_size": 16, "augment": "shift", **values})


def raw_batches(cfg: DataKeys, workers: int, *, pin: bool = False, start_method: str = "fork"):
    split = open_split(cfg.path, "train")
    picks = Order(0, split.counts, cfg.shuffle_window).batches(0, batch_size=cfg.batch_size, rank=0, world_size=1)
    loader = load(split, cfg.model_copy(update={"workers": workers}), picks, train=True, pin=pin)
    if workers:
        loader.multiprocessing_context = start_method
    return iter(loader)


def same(raw: Raw, other: Raw) -> bool:
    return torch.equal(raw.images, other.images) and torch.equal(raw.labels, other.labels) and raw[2:] == other[2:]


def check_while_in_use(raws, expected: list[Raw]) -> None:
    """Each batch is right when it comes and after the next has come, however far ahead the workers are."""
    before: list[Raw] = []
    for number, raw in enumerate(islice(raws, len(expected))):
        time.sleep(PAUSE_SECONDS)
        assert same(raw, expected[number])
        assert all(same(old, expected[number - 1]) for old in before)
        before = [raw]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_stays_until_the_one_after_the_next_is_asked_for(digits, workers):
    cfg = settings(digits)
    check_while_in_use(raw_batches(cfg, workers), list(islice(raw_batches(cfg, 0), 20)))


def test_then_its_slot_is_used_again(digits):
    first, *_, last = islice(raw_batches(settings(digits), 1), AHEAD + 3)
    assert first.images.data_ptr() == last.images.data_ptr()


def test_sizes_may_change_on_the_way(digits):
    cfg = settings(digits, batch_size=120, progressive=[[0, 8], [1, 24], [2, 12]], image_size=20)
    expected = list(islice(raw_batches(cfg, 0), 26))
    assert {raw.images.shape[1] for raw in expected} == {8, 24, 12}
    check_while_in_use(raw_batches(cfg, 2), expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_spawned_workers_find_the_slots(digits):
    cfg = settings(digits)
    check_while_in_use(raw_batches(cfg, 1, start_method="spawn"), list(islice(raw_batches(cfg, 0), 8)))


def test_two_iterators_at_once_do_not_share_slots(digits):
    cfg = settings(digits, workers=1)
    data = open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)
    expected = list(
        islice(open_train(settings(digits, workers=0), seed=0, rank=0, world_size=1, device=CPU).batches(0), 30)
    )
    abandoned = data.batches(0)
    next(abandoned)
    for number, batch in enumerate(islice(data.batches(80), 20)):
        assert torch.equal(batch.images, expected[number + 10].images)
        assert torch.equal(next(abandoned).images, expected[number + 1].images)


def test_batches_that_leave_the_package_own_their_memory(digits):
    kept, expected = (
        list(
            islice(
                open_train(settings(digits, workers=workers), seed=0, rank=0, world_size=1, device=CPU).batches(0), 20
            )
        )
        for workers in (1, 0)
    )
    assert all(torch.equal(batch.images, other.images) for batch, other in zip(kept, expected, strict=True))
    assert all(torch.equal(batch.labels, other.labels) for batch, other in zip(kept, expected, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_validation_passes_agree_also_after_one_that_was_abandoned(copy, workers):
    for bad in (7, 8, 100, 357, 358):
        corrupt(copy, bad, "validation")
    alone, data = (
        open_validation(settings(copy, batch_size=50, workers=count, max_skipped=1.0), rank=0, world_size=1, device=CPU)
        for count in (0, workers)
    )
    expected = list(alone.batches())
    assert [len(batch.labels) for batch in expected] == [48, 50, 49, 50, 50, 50, 50, 7]
    for read in (8, 8, 2, 1, 8):
        kept = list(islice(data.batches(), read))
        assert len(kept) == read
        assert all(torch.equal(batch.images, other.images) for batch, other in zip(kept, expected, strict=False))
        assert all(torch.equal(batch.labels, other.labels) for batch, other in zip(kept, expected, strict=False))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_bad_training_samples_are_replaced_within_the_slot(copy, workers):
    for bad in range(0, 1438, 3):
        corrupt(copy, bad)
    cfg = settings(copy, batch_size=16)
    expected = list(islice(raw_batches(cfg, 0), 12))
    intact = 0
    for raw in expected:
        known = {image.numpy().tobytes(): label for image, label in zip(raw.images, raw.labels.tolist(), strict=True)}
        assert len(known) == 16 - len(raw.skips)
        assert [known[image.numpy().tobytes()] for image in raw.images] == raw.labels.tolist()
        intact += len(known)
    assert 100 < intact < 160
    check_while_in_use(raw_batches(cfg, workers), expected)


def test_a_batch_without_good_samples_is_empty(copy):
    for bad in range(1438):
        corrupt(copy, bad)
    for workers in (0, 1):
        raw = next(raw_batches(settings(copy), workers))
        assert raw.images.shape == (0, 16, 16, 3)
        assert raw.labels.shape == (0,)
        # Its own eight, and those that might have stood in for them.
        assert len(raw.skips) == raw.num_read == MAX_BAD_IN_A_ROW


@pytest.fixture
def pinning(monkeypatch):
    """torch's pinning thread, as with a GPU; a pinned copy is an ordinary one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: CPU)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_pinned_batches_are_copies_that_stay(digits, pinning, workers):
    cfg = settings(digits)
    kept = []
    for raw in islice(raw_batches(cfg, workers, pin=True), 20):
        time.sleep(PAUSE_SECONDS)
        kept.append(raw)
    assert all(same(raw, other) for raw, other in zip(kept, islice(raw_batches(cfg, 0), 20), strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_batches_stay_too(digits, workers):
    shards = f"pipe:cat {digits}/train/shard-{{000000..000001}}.tar"
    cfg = settings(digits, workers=workers, stream=shards, stream_samples=400, progressive=[[1, 8]])
    batches = StreamedBatches(cfg, 10, Position(0, 0, 0, cfg.stream_samples, cfg.batch_size))
    sizes = []
    before: list[tuple[Raw, torch.Tensor]] = []
    for raw in islice(load_stream(batches, pin=False), 60):
        now = raw.images.clone()
        time.sleep(PAUSE_SECONDS / 3)
        assert torch.equal(raw.images, now)
        assert all(torch.equal(old.images, pixels) for old, pixels in before)
        before = [(raw, now)]
        sizes.append(raw.images.shape[1])
    assert sizes == [16] * 50 + [8] * 10


def test_without_workers_there_are_no_slots(digits):
    ring = Ring(settings(digits), 0)
    assert ring.images(0, 8, 16).data_ptr() != ring.images(0, 8, 16).data_ptr()


def test_a_batch_that_comes_after_its_ring_is_gone_is_nothing(digits):
    ring = Ring(settings(digits), 1)
    raw = Raw(ring.images(5, 8, 16).fill_(7), torch.arange(8), 3, [Skip("a", "empty", "")], 9)
    sent = pickle.dumps(ring.sent(5, raw))
    assert same(pickle.loads(sent), raw)
    del ring
    assert pickle.loads(sent) is None


def test_too_little_shared_memory_is_refused(digits, monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    cfg = settings(digits, workers=8, batch_size=64, image_size=224)
    data = open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)
    with pytest.raises(UserError, match=r"data.workers = 8: they need 165 MiB .* 64 images \(No space left on device"):
        next(data.batches(0))
