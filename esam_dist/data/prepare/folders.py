"""Any folder with one folder of images per class."""

from __future__ import annotations

from pathlib import Path

from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import SUFFIXES
from esam_dist.data.prepare.source import digest_of, held_out
from esam_dist.errors import UserError

VALIDATION_NAMES = ("validation", "val", "valid", "test")


class Folders:
    """`root/CLASS/...`, divided by `validation_share`; or `root/train/CLASS/...` and `root/val/CLASS/...`."""

    def __init__(self, root: Path, *, validation_share: float, seed: int, name: str = "") -> None:
        if not root.is_dir():
            raise UserError(f"--from {root}: no such folder; give a folder with one folder of images per class")
        self.name = name or root.resolve().name
        train = root / "train" if (root / "train").is_dir() else root
        validation = next((root / entry for entry in VALIDATION_NAMES if (root / entry).is_dir()), None)
        self.class_names = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
        self._files, labels = {"train": (found := class_files(train, self.class_names))[0]}, {"train": found[1]}
        if train != root and validation is not None:
            unknown = {entry.name for entry in validation.iterdir() if entry.is_dir()} - set(self.class_names)
            if unknown:
                raise UserError(f"--from {root}: {validation} has the class {min(unknown)!r}, which {train} has not")
            self._files["validation"], labels["validation"] = class_files(validation, self.class_names)
        else:
            parts = held_out(labels["train"], validation_share, seed)
            files, all_labels = self._files["train"], labels["train"]
            self._files = {split: [files[i] for i in ids] for split, ids in parts.items()}
            labels = {split: [all_labels[i] for i in ids] for split, ids in parts.items()}
        self.labels = labels
        self.digest = digest_of(
            f"{split} {path.relative_to(root)} {path.stat().st_size}"
            for split, files in self._files.items()
            for path in files
        )

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """An image file. Raises SampleError when it cannot be read."""
        return read_file(self._files[split][sample])


def class_files(folder: Path, class_names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """The image files below each class's folder, in order, and their labels. Raises UserError when there are none."""
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"--from {folder}: holds no folders with images; give a folder with one folder per class")
    return files, labels


def read_file(path: Path) -> tuple[bytes, str]:
    """An image file and its suffix. Raises SampleError when it is empty or cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError("unreadable", f"{path}: {error.strerror}") from None
    if not data:
        raise SampleError("empty", str(path))
    suffix = path.suffix.lower().lstrip(".")
    return data, "jpg" if suffix == "jpeg" else suffix
