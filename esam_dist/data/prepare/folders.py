"""Any folder with one folder of images per class."""

from __future__ import annotations

from pathlib import Path

from esam_dist.data.prepare.files import FileSource, class_files, class_folders
from esam_dist.data.prepare.source import held_out
from esam_dist.errors import UserError

VALIDATION_NAMES = ("validation", "val", "valid", "test")


def folders(root: Path, *, validation_share: float, seed: int) -> FileSource:
    """`root/CLASS/...`, divided by `validation_share`; or `root/train/CLASS/...` and `root/val/CLASS/...`."""
    if not root.is_dir():
        raise UserError(f"--from {root}: no such folder; give a folder with one folder of images per class")
    train = root / "train" if (root / "train").is_dir() else root
    validation = next((root / name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    class_names = class_folders(train)
    samples = {"train": class_files(train, class_names)}
    if train != root and validation is not None:
        samples["validation"] = class_files(validation, class_names)
    else:
        parts = held_out([label for label, _ in samples["train"]], validation_share, seed)
        samples = {split: [samples["train"][i] for i in ids] for split, ids in parts.items()}
    return FileSource(root.resolve().name, root, class_names, samples)
