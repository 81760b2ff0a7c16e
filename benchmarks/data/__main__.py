"""How fast images become batches: this package against plain webdataset and torchvision's ImageFolder.

    python -m benchmarks.data [--images 600] [--rounds 5] [--workers 1] [--out FILE]

The same natural-looking JPEGs (photographs.py) go through whole loaders: read, decode, random resized crop to 224,
flip, collate, normalise. They are originals of 500x375 at quality 90, these with restart markers (where jpegtran is
installed), and prepared with a short side of 256. All loaders and images take turns. A core's speed is images per
second of CPU time, of all processes of the loader together, so that a machine that does other work at the same time
does not count; wall-clock speed is reported beside it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import psutil
import simplejpeg
import torch
import torchvision
import webdataset
from torchvision.transforms import v2

from benchmarks.data.photographs import jpeg, photograph
from esam_dist.data import open_train
from esam_dist.data.dataset import open_split
from esam_dist.data.keys import DataKeys
from esam_dist.data.loader import load
from esam_dist.data.order import Order
from esam_dist.data.prepare.encode import JPEGTRAN, Encoding
from esam_dist.data.prepare.folders import folders
from esam_dist.data.prepare.write import Plan, write_dataset

BATCH, SIZE, CLASSES = 100, 224, 10
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RESULTS = Path(__file__).parent / "results"
Loader = Callable[[Path, int], Iterator[Any]]


class Speed(NamedTuple):
    """One round of one loader."""

    per_core: float
    """Images per second of CPU time."""
    wall: float
    """Images per second."""
    worker_pss_mib: float
    """Memory of the largest worker, shared pages divided among those who share them."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write every round to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=RESULTS / "loaders.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_measure(_make(Path(folder), args.images), args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"every round: {args.out}")


def _measure(sets: dict[str, Path], args: argparse.Namespace) -> Iterator[dict[str, object]]:
    rounds: dict[tuple[str, int, str], list[Speed]] = {
        key: [] for key in itertools.product(sets, args.workers, LOADERS)
    }
    # Everything takes turns: a machine that others use changes its speed in between.
    for number in range(args.rounds):
        for (name, workers, loader), speeds in rounds.items():
            speed = _round(LOADERS[loader](sets[name], workers), -(-args.images // BATCH))
            speeds.append(speed)
            yield {
                "images": name,
                "workers": workers,
                "loader": loader,
                "round": number,
                **{key: round(value, 1) for key, value in speed._asdict().items()},
                "load": round(os.getloadavg()[0], 1),
                **_machine(),
            }
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    print(f"{'images':12} {'workers':7} {'loader':24} {'img/s per core':>20} {'img/s wall':>16} {'MiB/worker':>10}")
    for (name, workers, loader), speeds in rounds.items():
        told = f"{_spread(speeds, 0):>20} {_spread(speeds, 1):>16} {speeds[-1].worker_pss_mib:10.0f}"
        print(f"{name:12} {workers:7} {loader:24} {told}")


def _round(stream: Iterator[Any], batches: int) -> Speed:
    """Measure one loader, alone: workers of others that read ahead would be counted, or get their work for nothing."""
    # Libraries load, tables are built; before and after the measurement, workers are two batches ahead.
    list(itertools.islice(stream, 3))
    workers = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    before, start = _cpu_seconds(workers), time.perf_counter()
    images = sum(_size(batch) for batch in itertools.islice(stream, batches))
    wall, cpu = time.perf_counter() - start, _cpu_seconds(workers) - before
    memory = [process.memory_full_info().pss / 2**20 for process in workers]
    return Speed(images / cpu, images / wall, max(memory, default=0.0))


def _cpu_seconds(workers: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in [psutil.Process(), *workers])


def _size(batch: Any) -> int:
    images, labels = batch
    assert images.shape[1:] == (3, SIZE, SIZE)
    return len(labels)


def _spread(speeds: list[Speed], column: int) -> str:
    values = [speed[column] for speed in speeds]
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def _machine() -> dict[str, str]:
    versions = {
        "torch": torch,
        "torchvision": torchvision,
        "webdataset": webdataset,
        "opencv": cv2,
        "simplejpeg": simplejpeg,
    }
    return {
        "processor": next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")),
            platform.processor(),
        ),
        "python": platform.python_version(),
        **{name: str(getattr(module, "__version__", "")) for name, module in versions.items()},
        "command": " ".join(["python -m benchmarks.data", *sys.argv[1:]]),
    }


def _make(folder: Path, num_images: int) -> dict[str, Path]:
    """Class folders and shards of the same images, each as its set stores them."""
    sets = {
        "originals": Encoding(),
        "with markers": Encoding(restart_markers=True),
        "256-pixel": Encoding(short_side=256, quality=90),
    }
    if shutil.which(JPEGTRAN) is None:
        print(f"{JPEGTRAN} is not installed: no originals with restart markers")
        del sets["with markers"]
    for number in range(num_images):
        data = jpeg(photograph(number))
        for name, encoding in sets.items():
            path = folder / name / "folders" / "train" / f"class{number % CLASSES}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoding(data, "jpg")[0])
    for name in sets:
        source = folders(folder / name / "folders", validation_share=0.02, seed=0)
        write_dataset(source, folder / name / "shards", Plan(samples_per_shard=200))
    return {name: folder / name for name in sets}


def _ours(root: Path, workers: int, **values: Any) -> Iterator[Any]:
    cfg = DataKeys(
        path=root / "shards", batch_size=BATCH, workers=workers, image_size=SIZE, augment="imagenet", **values
    )
    return open_train(cfg, seed=0, rank=0, world_size=1, device=torch.device("cpu")).batches(0)


def _fast(root: Path, workers: int) -> Iterator[Any]:
    return _ours(root, workers, antialias=False)


def _recipe() -> v2.Compose:
    """The usual transforms of ImageNet training, from a PIL image to floats."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def _raw(root: Path, workers: int) -> Iterator[Any]:
    """What a GPU is sent, which then normalises: bytes."""
    cfg = DataKeys(path=root / "shards", batch_size=BATCH, workers=workers, image_size=SIZE, augment="imagenet")
    split = open_split(cfg.path, "train")
    picks = Order(0, split.counts, cfg.shuffle_window).batches(0, batch_size=BATCH, rank=0, world_size=1)
    raws = load(split, cfg, picks, train=True, pin=False)
    return ((raw.images.permute(0, 3, 1, 2), raw.labels) for raw in raws)


def _webdataset(root: Path, workers: int) -> Iterator[Any]:
    shards = sorted(map(str, (root / "shards" / "train").glob("*.tar")))
    recipe = _recipe()
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(recipe, int)
        .batched(BATCH)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def _image_folder(root: Path, workers: int) -> Iterator[Any]:
    folder = torchvision.datasets.ImageFolder(str(root / "folders" / "train"), _recipe())
    sampler = torch.utils.data.RandomSampler(folder)
    loader = torch.utils.data.DataLoader(
        folder, BATCH, sampler=sampler, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


LOADERS: dict[str, Loader] = {
    "esam_dist": _ours,
    "esam_dist, bytes for GPU": _raw,
    "esam_dist, antialias off": _fast,
    "webdataset": _webdataset,
    "ImageFolder": _image_folder,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
