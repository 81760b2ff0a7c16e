"""Write a source of labelled images as shards: samples shuffled by the seed, so that every shard is a fair mix."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from esam_dist.data.dataset import DESCRIPTION, FORMAT
from esam_dist.data.order import mix
from esam_dist.data.shards import Sample, ShardInfo, write_shard

_ORDER = 11


class Source(Protocol):
    """Labelled images of any origin: `labels` holds one label per sample of each split, `read` an image file."""

    @property
    def name(self) -> str:
        """What the dataset is called in `dataset.json`."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """The name of each label."""
        ...

    @property
    def labels(self) -> Mapping[str, Sequence[int]]:
        """The label of every sample, by split."""
        ...

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """The image file of a sample, and its suffix."""
        ...


def write_dataset(source: Source, out: Path, *, seed: int, samples_per_shard: int) -> None:
    """Write every split of `source` below `out`, and `dataset.json` last."""
    splits: dict[str, Any] = {}
    for split, labels in source.labels.items():
        order = np.argsort(mix(seed, _ORDER, np.arange(len(labels))))
        num_shards = -(-len(labels) // samples_per_shard)
        shards: list[dict[str, Any]] = []
        for number, part in enumerate(np.array_split(order, num_shards)):
            path = out / split / f"shard-{number:06d}.tar"
            first_key = sum(shard["samples"] for shard in shards)
            info = write_shard(path, _samples(source, split, part.tolist()), first_key)
            shards.append(_listed(path, info))
        counts = np.bincount(labels, minlength=len(source.class_names)).tolist()
        splits[split] = {"samples": len(labels), "class_counts": counts, "shards": shards}
    description = {
        "format": FORMAT,
        "name": source.name,
        "seed": seed,
        "classes": list(source.class_names),
        "splits": splits,
    }
    partial = out / f"{DESCRIPTION}.part"
    partial.write_text(json.dumps(description, indent=1) + "\n")
    partial.replace(out / DESCRIPTION)


def _samples(source: Source, split: str, ids: list[int]) -> Iterator[Sample]:
    for sample in ids:
        image, suffix = source.read(split, sample)
        yield Sample(image, suffix, source.labels[split][sample])


def _listed(path: Path, info: ShardInfo) -> dict[str, Any]:
    return {"file": path.name, "samples": info.samples, "sha256": info.sha256}
