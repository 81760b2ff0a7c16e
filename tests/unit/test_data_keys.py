"""The samples that an error names are those of the batch: other programs read its images from the shard."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esam_dist.data import TrainData, open_train
from esam_dist.data.keys import DataKeys
from tests.streamed import shard, sound

SIZE = 8
CPU = torch.device("cpu")


def keys(path: Path, **values: object) -> DataKeys:
    plain = {"augment": "none", "image_size": SIZE, "batch_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    return DataKeys(**{"path": path, "workers": 0, **plain, **values})


def pixels_of(name: str) -> np.ndarray:
    """What Pillow makes of a member, named as SHARD:MEMBER."""
    path, _, member = name.rpartition(":")
    with tarfile.open(path) as tar:
        found = next(info for info in tar if info.name.startswith(member) and not info.name.endswith(".cls"))
        return np.asarray(Image.open(io.BytesIO(tar.extractfile(found).read())).convert("RGB"))


def assert_named(data: TrainData, first: int, step: int, count: int) -> None:
    for number, batch in enumerate(islice(data.batches(first), count)):
        names = data.keys_at(first + number * step)
        assert len(names) == len(batch.images)
        for name, image in zip(names, batch.images, strict=True):
            assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels_of(name))


@pytest.mark.parametrize("rank", [0, 1])
def test_of_an_index_they_are_known_by_their_place(few_digits: Path, rank: int) -> None:
    data = open_train(keys(few_digits), seed=3, rank=rank, world_size=2, device=CPU)
    # 80 samples: beyond the end of an epoch, too.
    assert_named(data, 48, 16, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_stream_the_latest_are_known(few_digits: Path, tmp_path: Path, workers: int) -> None:
    for number in range(2):
        shard(tmp_path / f"{number}.tar", sound(30))
    stream = {"stream": f"{tmp_path}/{{0..1}}.tar", "stream_samples": 60, "workers": workers}
    data = open_train(keys(few_digits, **stream), seed=3, rank=0, world_size=2, device=CPU)
    assert_named(data, 32, 16, 4)
    assert data.keys_at(0) == []
