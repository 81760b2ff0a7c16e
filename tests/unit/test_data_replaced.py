"""Shards that change under a running job: old bytes or a counted skip, never a wrong label, never a hang."""

import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from esam_dist.data import open_train
from esam_dist.data.keys import DataKeys
from esam_dist.data.prepare import prepare_digits
from esam_dist.errors import UserError

CPU = torch.device("cpu")
STEPS = 40


@pytest.fixture
def copy(digits, tmp_path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))


@pytest.fixture
def other(tmp_path) -> Path:
    """Shards of the same names and other samples."""
    prepare_digits(tmp_path / "other", seed=7)
    return tmp_path / "other"


def opened(root: Path, **values):
    cfg = DataKeys(**{"path": root, "batch_size": 32, "workers": 0, "image_size": 8, "augment": "none", **values})
    return open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)


def equal(left, right) -> bool:
    return torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)


def read(data, change, num_before=5):
    """Batches of a job under which `change` happens after the first few."""
    batches = data.batches(0)
    before = list(islice(batches, num_before))
    change()
    return before + list(islice(batches, STEPS - num_before))


@pytest.fixture
def expected(digits):
    return list(islice(opened(digits).batches(0), STEPS))


def test_shards_replaced_by_renaming_go_on_being_read(copy, other, expected):
    def replace():
        for shard in (other / "train").glob("*.tar"):
            os.replace(shard, copy / "train" / shard.name)

    seen = read(opened(copy), replace)
    assert all(equal(*pair) for pair in zip(seen, expected, strict=True))


def test_shards_overwritten_in_place_are_skipped_and_counted_with_no_wrong_label(copy, other, expected):
    pairs = {
        (i.numpy().tobytes(), int(k)) for batch in expected for i, k in zip(batch.images, batch.labels, strict=True)
    }

    def overwrite():
        (copy / "train" / "shard-000001.tar").write_bytes((other / "train" / "shard-000001.tar").read_bytes())

    data = opened(copy, max_skipped=1.0)
    seen = read(data, overwrite)
    assert all(len(batch.labels) == 32 for batch in seen)
    assert {(i.numpy().tobytes(), int(k)) for b in seen for i, k in zip(b.images, b.labels, strict=True)} <= pairs
    assert set(data.skipped) == {"checksum"}
    assert data.skipped["checksum"] > 200


def test_shards_truncated_under_the_job_are_skipped_and_counted(copy):
    def truncate():
        os.truncate(copy / "train" / "shard-000002.tar", 100_000)

    data = opened(copy, max_skipped=1.0)
    assert all(len(batch.labels) == 32 for batch in read(data, truncate))
    assert set(data.skipped) <= {"checksum", "empty"}
    assert sum(data.skipped.values()) > 200


def test_a_shard_that_vanishes_before_it_is_opened_is_counted(copy):
    data = opened(copy, max_skipped=1.0)
    seen = read(data, (copy / "train" / "shard-000003.tar").unlink, num_before=0)
    assert all(len(batch.labels) == 32 for batch in seen)
    assert set(data.skipped) == {"unreadable"}


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_read_the_run_stops_with_one_line(copy, workers):
    data = opened(copy, workers=workers)
    for shard in (copy / "train").glob("*.tar"):
        shard.write_bytes(np.random.default_rng(0).bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"no batch can be filled, 64 samples .*\(checksum: ") as caught:
        next(data.batches(0))
    assert "\n" not in str(caught.value)
