"""Samples that cannot be used: replaced or left out, counted, named, and too many of them stop a run."""

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from esam_dist.data import open_validation
from esam_dist.data.dataset import open_split
from esam_dist.data.order import Order
from esam_dist.data.shards import Sample, write_shard
from esam_dist.errors import UserError
from esam_dist.evaluate import evaluate
from esam_dist.metrics import Metrics
from esam_dist.ranks import Ranks
from tests.commands import here
from tests.unit.test_data_decode import png_of
from tests.unit.test_data_loader import CPU, batches, corrupt, settings, train


def test_a_corrupt_sample_is_replaced_counted_and_named_once(copy, caplog):
    intact = batches(settings(copy, batch_size=1437), 0, 1)[0]
    data = train(settings(copy))
    bad = int(Order(0, open_split(copy, "train").counts, 16).picks(40, 1).ids[0])
    corrupt(copy, bad)
    with caplog.at_level(logging.WARNING):
        read = list(islice(data.batches(0), 45 + 45))
    assert torch.equal(read[1].images[8], intact.images[41])
    assert read[1].labels[8] == intact.labels[41]
    assert torch.equal(read[1].images[9], intact.images[41])
    assert all(len(batch.labels) == 32 for batch in read)
    assert data.skipped == {"checksum": 2}
    assert len(caplog.records) == 1
    assert "shard-00000" in caplog.text
    assert ".png" in caplog.text


def test_a_corrupt_validation_sample_is_left_out(copy):
    corrupt(copy, 7, "validation")
    data = open_validation(settings(copy), rank=0, world_size=1, device=CPU)
    assert sum(len(batch.labels) for batch in data.batches()) == 358
    assert data.skipped == {"checksum": 1}


def first_ids(root: Path, count: int) -> list[int]:
    """The samples that training begins with."""
    return Order(0, open_split(root, "train").counts, 16).picks(0, count).ids.tolist()


def test_too_many_corrupt_samples_stop_the_run(copy):
    for sample in range(100):
        corrupt(copy, sample)
    with pytest.raises(
        UserError, match=r"max_skipped = 0.01: \d+ of \d+ samples .* cannot be used \(checksum\)"
    ) as caught:
        list(islice(train(settings(copy)).batches(0), 45))
    assert "\n" not in str(caught.value)


def test_the_limit_is_as_strict_for_each_of_many_ranks(copy):
    for sample in range(144):
        corrupt(copy, sample)
    for rank in range(8):
        # A tenth is bad: an eighth of the epoch shows it.
        with pytest.raises(UserError, match=r"data.max_skipped = 0.01"):
            batches(settings(copy, batch_size=8), 0, 1438 // 64, rank=rank, world_size=8)


def test_the_first_bad_samples_stop_no_run_unless_none_is_allowed(copy):
    for sample in first_ids(copy, 10)[::2]:
        corrupt(copy, sample)
    cfg = settings(copy, batch_size=1)
    data = train(cfg)
    assert len(list(islice(data.batches(0), 300))) == 300
    assert data.skipped == {"checksum": 5}
    with pytest.raises(UserError, match=r"max_skipped = 0: 1 of 2 samples"):
        batches(settings(copy, batch_size=1, max_skipped=0.0), 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_one_bad_sample_shows_another_and_its_label(copy, workers):
    known = batches(settings(copy, batch_size=1438), 0, 1)[0]
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(known.images, known.labels, strict=True)}
    bad = first_ids(copy, 4)
    for sample in (bad[1], bad[1] + 1, bad[2]):
        corrupt(copy, sample)
    read = batches(settings(copy, batch_size=1, workers=workers), 0, 4)
    assert [len(batch.labels) for batch in read] == [1] * 4
    assert all(labels[batch.images[0].numpy().tobytes()] == int(batch.labels) for batch in read)
    intact = {batch.images.numpy().tobytes() for batch in (read[0], read[3])}
    assert intact == {known.images[place].numpy().tobytes() for place in (0, 3)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("batch_size", [1, 50])
def test_a_set_without_a_good_sample_stops_the_run_whatever_the_limit(copy, batch_size):
    for sample in range(1438):
        corrupt(copy, sample)
    with pytest.raises(UserError, match=r"data.path: no batch can be filled, \d+ samples .*checksum"):
        batches(settings(copy, batch_size=batch_size, max_skipped=1.0), 0, 1)


def test_validation_goes_on_after_a_batch_of_one_bad_sample_and_keeps_the_limit(copy):
    corrupt(copy, 358, "validation")
    data = open_validation(settings(copy, batch_size=179), rank=0, world_size=1, device=CPU)
    for count in (1, 2):
        assert [len(batch.labels) for batch in data.batches()] == [179, 179]
        assert data.skipped == {"checksum": count}
    for sample in range(36):
        corrupt(copy, sample, "validation")
    with pytest.raises(UserError, match=r"data.max_skipped = 0.01"):
        list(open_validation(settings(copy), rank=0, world_size=1, device=CPU).batches())


def test_validation_without_a_good_sample_is_an_error_and_no_score(copy):
    for sample in range(359):
        corrupt(copy, sample, "validation")
    data = open_validation(settings(copy, max_skipped=1.0), rank=0, world_size=1, device=CPU)
    with pytest.raises(UserError, match="not one sample of the validation set"):
        evaluate(torch.nn.Flatten(), data, Ranks())


UNUSABLE = {10: b"", 50: b"no image", 90: png_of(11_000, 11_000), 130: png_of(500, 500)}
REASONS = {"empty": 1, "undecodable": 2, "too_large": 1}


def spoil(root: Path, split: str) -> None:
    """Write the first shard again with image files that cannot be used."""
    opened = open_split(root, split)
    samples = (Sample(UNUSABLE.get(n, opened.read(n)), "png", opened.label(n)) for n in range(opened.counts[0]))
    info = write_shard(opened.shards[0], [*samples], 0)
    description = json.loads((root / "dataset.json").read_text())
    description["splits"][split]["shards"][0]["sha256"] = info.sha256
    (root / "dataset.json").write_text(json.dumps(description))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_reason_is_counted(copy, workers):
    for split in ("train", "validation"):
        spoil(copy, split)
    cfg = settings(copy, batch_size=719, workers=workers)
    data, validation = train(cfg), open_validation(cfg, rank=0, world_size=1, device=CPU)
    assert [len(batch.labels) for batch in islice(data.batches(0), 2)] == [719, 719]
    assert sum(len(batch.labels) for batch in validation.batches()) == 355
    assert data.skipped == validation.skipped == REASONS


def test_what_is_skipped_in_training_and_validation_reaches_the_metrics(copy, tiny, tmp_path, monkeypatch):
    for split in ("train", "validation"):
        spoil(copy, split)
    made = []
    monkeypatch.setattr(
        "esam_dist.cli.Metrics", lambda *args, **kwargs: made.append(Metrics(*args, **kwargs)) or made[0]
    )
    changes = ("data.batch_size=719", "data.image_size=8", "train.epochs=1", "method.name=sgd")
    answer = here("train", tiny, f"run.folder={tmp_path / 'run'}", f"data.path={copy}", *changes)
    assert answer.status == 0, answer.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for kind in ("train", "validation"):
        counts: Counter[str] = Counter()
        for row in rows:
            counts.update(row["skipped_samples"] if row["kind"] == kind else {})
        assert counts == REASONS
    for reason, count in REASONS.items():
        value = made[0].registry.get_sample_value("esam_skipped_samples_total", {"rank": "0", "reason": reason})
        assert value == 2 * count
