"""From prepared digits to batches: what the training loop relies on."""

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from esam_dist.data import open_train, open_validation
from esam_dist.data.dataset import open_split
from esam_dist.data.keys import DataKeys
from esam_dist.data.prepare import prepare_digits
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.errors import UserError
from tests.commands import environment
from tests.prepared import Noise

CPU = torch.device("cpu")


def settings(path: Path, **values) -> DataKeys:
    return DataKeys(**{"path": path, "batch_size": 32, "workers": 0, "augment": "none", **values})


def train(cfg: DataKeys, rank=0, world_size=1, seed=0):
    return open_train(cfg, seed=seed, rank=rank, world_size=world_size, device=CPU)


def batches(cfg: DataKeys, start: int, count: int, **kwargs):
    data = train(cfg, **kwargs)
    return list(islice(data.batches(start), count))


def test_same_seed_same_bytes(digits, tmp_path):
    prepare_digits(tmp_path / "again")
    prepare_digits(tmp_path / "other", seed=1)
    files = sorted(path.relative_to(digits) for path in digits.rglob("*") if path.is_file())
    assert [(tmp_path / "again" / f).read_bytes() for f in files] == [(digits / f).read_bytes() for f in files]
    assert [(tmp_path / "other" / f).read_bytes() for f in files] != [(digits / f).read_bytes() for f in files]


def test_the_split_is_stratified_and_complete(digits):
    splits = json.loads((digits / "dataset.json").read_text())["splits"]
    held_out, rest = np.array(splits["validation"]["class_counts"]), np.array(splits["train"]["class_counts"])
    assert held_out.sum() + rest.sum() == 1797
    assert np.abs(held_out / (held_out + rest) - 0.2).max() < 0.01


def test_images_and_labels_belong_together(digits):
    from sklearn.datasets import load_digits

    known = load_digits()
    by_pixels = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(known.images, known.target, strict=True)
    }
    cfg = settings(digits, image_size=8, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    for batch in batches(cfg, 0, 40):
        for image, label in zip(batch.images, batch.labels, strict=True):
            pixels = (image * 255).round().to(torch.uint8)
            assert (pixels[0] == pixels[1]).all()
            assert by_pixels[pixels[0].numpy().tobytes()] == label


@pytest.mark.parametrize("augment", ["none", "shift", "imagenet"])
def test_batches_are_full_normalised_and_static(digits, augment):
    for batch in batches(settings(digits, augment=augment), 1430, 3):
        assert batch.images.shape == (32, 3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.labels.shape == (32,)
        assert batch.labels.dtype == torch.int64
        assert -2.2 < batch.images.min() < -1.7
        assert 1.7 < batch.images.max() < 2.7


@pytest.mark.parametrize("augment", ["shift", "imagenet"])
def test_workers_ranks_and_batch_size_do_not_change_a_sample(digits, augment):
    one = batches(settings(digits, augment=augment, batch_size=48), 480, 2)
    ranks = [
        batches(settings(digits, augment=augment, batch_size=16, workers=rank), 480, 2, rank=rank, world_size=3)
        for rank in range(3)
    ]
    for step in range(2):
        assert torch.equal(one[step].images, torch.cat([rank[step].images for rank in ranks]))
        assert torch.equal(one[step].labels, torch.cat([rank[step].labels for rank in ranks]))


def test_augmentation_changes_from_epoch_to_epoch(digits):
    def sum_by_sample(epoch):
        cfg = settings(digits, augment="shift", batch_size=1437)
        return batches(cfg, 1437 * epoch, 1)[0].images.abs().sum((1, 2, 3)).sort().values

    assert not torch.equal(sum_by_sample(0), sum_by_sample(1))


def test_flip_mirrors_about_half_of_the_images(digits):
    plain, flipped = (batches(settings(digits, flip=flip, batch_size=500), 0, 1)[0].images for flip in (False, True))
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 200 < mirrored.sum() < 300


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_sees_every_sample_once(digits, world_size):
    labels = []
    for rank in range(world_size):
        data = open_validation(settings(digits, batch_size=50), rank=rank, world_size=world_size, device=CPU)
        labels += [label for batch in data.batches() for label in batch.labels.tolist()]
        assert data.num_samples == 359
    counts = json.loads((digits / "dataset.json").read_text())["splits"]["validation"]["class_counts"]
    assert np.bincount(labels).tolist() == counts


def test_more_ranks_than_validation_samples_leaves_some_ranks_without_batches(digits):
    sizes = []
    for rank in range(400):
        data = open_validation(settings(digits), rank=rank, world_size=400, device=CPU)
        sizes.append(sum(len(batch.labels) for batch in data.batches()))
    assert sum(sizes) == 359
    assert 0 in sizes


def corrupt(root: Path, sample: int, split: str = "train") -> None:
    """Overwrite the first bytes of an image in place."""
    opened = open_split(root, split)
    shard = opened.shards[opened._shard(sample)]
    with shard.open("r+b") as file:
        file.seek(int(opened.entries["offset"][sample]))
        file.write(b"broken")


def refused(copy: Path, **values) -> str:
    with pytest.raises(UserError) as caught:
        train(settings(copy, **values))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_folder_is_refused(tmp_path):
    assert "no such folder; write it with `esam-dist prepare" in refused(tmp_path / "none")


def test_a_folder_without_description_is_refused(copy):
    (copy / "dataset.json").unlink()
    assert "has no dataset.json" in refused(copy)


def test_a_missing_index_is_refused(copy):
    (copy / "train" / "shard-000001.index").unlink()
    assert "shard-000001.index cannot be read" in refused(copy)


def test_a_missing_shard_is_refused(copy):
    (copy / "train" / "shard-000001.tar").unlink()
    assert "shard-000001.tar cannot be read" in refused(copy)


def test_an_empty_shard_is_refused(copy):
    (copy / "train" / "shard-000001.tar").write_bytes(b"")
    assert "does not match shard-000001.tar (0 bytes)" in refused(copy)


def test_a_truncated_shard_is_refused(copy):
    shard = copy / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-10240])
    assert "does not match shard-000001.tar" in refused(copy)


def test_the_index_of_another_shard_is_refused(copy):
    shutil.copy(copy / "train" / "shard-000000.index", copy / "train" / "shard-000001.index")
    assert "shard-000001.index does not match shard-000001.tar" in refused(copy)


def test_a_shard_replaced_together_with_its_index_is_refused(copy):
    for suffix in ("index", "tar"):
        shutil.copy(copy / "train" / f"shard-000000.{suffix}", copy / "train" / f"shard-000001.{suffix}")
    assert "shard-000001.tar is not the shard that dataset.json lists" in refused(copy)


def test_labels_out_of_range_are_refused(copy):
    path = copy / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": list("01234")}))
    assert "outside 0 to 4" in refused(copy)


def test_a_batch_larger_than_the_set_is_refused(copy):
    with pytest.raises(UserError, match=r"data.batch_size = 1000 on 2 ranks needs 2000 samples.*at most 719, or fewer"):
        train(settings(copy, batch_size=1000), world_size=2)


MEMORY = """
import sys
from itertools import islice
from pathlib import Path
import psutil, torch
from esam_dist.data import open_train
from esam_dist.data.keys import DataKeys
cfg = DataKeys(path=Path(sys.argv[1]), workers=1, batch_size=32, image_size=64, augment="imagenet")
batches = open_train(cfg, seed=0, rank=0, world_size=1, device=torch.device("cpu")).batches(0)
owner = psutil.Process()
for epoch in range(11):
    for batch in islice(batches, 1438 // 32):
        pass
    (worker,) = owner.children()
    shared = [area for area in owner.memory_maps(grouped=False) if area.path.startswith("/dev/shm/torch")]
    print(worker.memory_info().rss, owner.memory_info().rss, len(shared), sum(area.size for area in shared))
batches.close()
psutil.wait_procs([worker], timeout=10)
print(len(owner.children()))
"""


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory) -> Path:
    """Small JPEGs: what simplejpeg decodes."""
    root = tmp_path_factory.mktemp("data") / "jpegs"
    write_dataset(Noise(), root, Plan(samples_per_shard=16))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("images", ["digits", "jpegs"])
def test_neither_owner_nor_worker_grows_over_ten_epochs_and_workers_end_with_their_iterator(images, request):
    command = [sys.executable, "-c", MEMORY, str(request.getfixturevalue(images))]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True).stdout
    *epochs, left = (tuple(map(int, line.split())) for line in told.splitlines())
    for process in (0, 1):
        # From the third epoch on: the first ones fill allocators.
        assert epochs[-1][process] - epochs[2][process] < 8 * 2**20
    # One mapping of four slots, in every epoch.
    slots = 4 * 32 * 64 * 64 * 3
    assert {epoch[2:] for epoch in epochs} == {(1, slots)}
    assert left == (0,)
