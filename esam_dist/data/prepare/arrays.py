"""Datasets that come as arrays in a few files: CIFAR's python batches, and the idx files of Fashion-MNIST.

Their archives are user input: the pickles are read by an unpickler that builds arrays and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esam_dist.data.prepare.archives import read_files, read_whole
from esam_dist.data.prepare.encode import png
from esam_dist.data.prepare.source import array_digest, digest_of
from esam_dist.errors import UserError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""

_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = {"train": [f"data_batch_{number}" for number in range(1, 6)], "validation": ["test_batch"]}
_CIFAR100 = {"train": ["train"], "validation": ["test"]}

Array = NDArray[Any]
Built = TypeVar("Built")


class ArraySource:
    """Images as arrays in memory, stored as PNG: nothing is lost, and at this size JPEG saves nothing."""

    def __init__(
        self, name: str, class_names: Sequence[str], images: Mapping[str, Array], labels: Mapping[str, Array]
    ) -> None:
        self.name, self.class_names = name, tuple(class_names)
        self._images = images
        self.labels = {split: values.astype(int).tolist() for split, values in labels.items()}
        self.digest = digest_of([self.class_names, self.labels, *map(array_digest, images.values())])
        for split, values in self.labels.items():
            if len(values) != len(images[split]) or not all(0 <= label < len(class_names) for label in values):
                raise UserError(f"{name}: images and labels of the split {split!r} do not match; get the files again")

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """An image as PNG."""
        return png(Image.fromarray(self._images[split][sample]))

    def describe(self, split: str, sample: int) -> str:
        """The number of an image."""
        return f"image {sample} of {split}"


def fashion_mnist(folder: Path | None) -> ArraySource:
    """The idx files (plain or .gz) in `folder`, or in Debian's package. Raises UserError when they are not there."""
    folder = folder or DEBIAN_FASHION_MNIST
    files = {"train": "train", "validation": "t10k"}
    images = {split: _idx(folder, f"{stem}-images-idx3-ubyte", 3) for split, stem in files.items()}
    labels = {split: _idx(folder, f"{stem}-labels-idx1-ubyte", 1) for split, stem in files.items()}
    return ArraySource("fashion-mnist", _FASHION, images, labels)


def cifar(name: str, path: Path) -> ArraySource:
    """CIFAR-10 or CIFAR-100 (`cifar10`, `cifar100`) from the folder or .tar.gz of python batches at `path`."""
    files = _CIFAR10 if name == "cifar10" else _CIFAR100
    label_key, names_file, names_key = (
        ("labels", "batches.meta", "label_names") if name == "cifar10" else ("fine_labels", "meta", "fine_label_names")
    )
    found = read_files(path, [names_file, *(batch for batches in files.values() for batch in batches)])

    def images_and_labels(batch: dict[str, Any]) -> tuple[Array, Array]:
        rows = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)
        return rows.transpose(0, 2, 3, 1), np.asarray(batch[label_key], np.int64)

    names = _unpickled(path, found, names_file, lambda batch: [_text(entry) for entry in batch[names_key]])
    images, labels = {}, {}
    for split, batches in files.items():
        parts = [_unpickled(path, found, batch, images_and_labels) for batch in batches]
        images[split], labels[split] = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ArraySource(name, names, images, labels)


def _idx(folder: Path, stem: str, dimensions: int) -> Array:
    """An array of bytes: after 0, 0, 8 and the number of dimensions come their sizes, then the contents."""
    path = next((file for file in (folder / f"{stem}.gz", folder / stem) if file.is_file()), None)
    if path is None:
        raise UserError(
            f"--from {folder}: has no {stem}.gz; give the folder of the idx files, or install the Debian package "
            "dataset-fashion-mnist"
        )
    data = read_whole(path)
    try:
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("another format")
        shape = np.frombuffer(data, ">u4", count=dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except ValueError as error:
        raise UserError(f"--from {folder}: {path.name} is damaged ({error}); get it again") from None


def _unpickled(path: Path, found: dict[str, bytes], name: str, build: Callable[[dict[str, Any]], Built]) -> Built:
    """What `build` makes of the file `name` of python batches. Raises UserError."""
    try:
        batch = _ArraysOnly(io.BytesIO(found[name]), encoding="bytes").load()
        return build({_text(key): value for key, value in batch.items()})
    except Exception as error:
        # Damaged bytes can make an unpickler, and numpy after it, raise anything.
        raise UserError(f"--from {path}: {name} is not a python batch ({error!r}); get it again") from None


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain values; any other class in a pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module in {"numpy.core.numeric", "numpy._core.numeric"} and name == "_frombuffer":
            return np._core.numeric._frombuffer  # type: ignore[attr-defined]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"refuses {module}.{name}")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
