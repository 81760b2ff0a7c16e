"""Any folder with one folder of images per class."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from esam_dist.data.prepare.files import FileSource, Span, class_files
from esam_dist.data.prepare.listing import Listing
from esam_dist.data.prepare.source import held_out
from esam_dist.errors import UserError

log = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "val", "valid", "test")
_SPLIT_NAMES = {*VALIDATION_NAMES, "train", "training", "testing"}


def folders(root: Path, *, validation_share: float, seed: int, limit: int | None = None) -> FileSource:
    """`root/CLASS/...`, divided by `validation_share`; or `root/train/CLASS/...` and `root/val/CLASS/...`.

    Labels number the classes of all splits, in order. `limit`: of each class so many images of each folder at most.
    """
    if not root.is_dir():
        raise UserError(f"--from {root}: no such folder; give a folder with one folder of images per class")
    listing = Listing(root)
    splits = _splits(listing)
    of_split = {split: listing.folders(folder) for split, folder in splits.items()}
    class_names = sorted({name for names in of_split.values() for name in names})
    samples = {split: class_files(listing, folder, class_names, limit) for split, folder in splits.items()}
    _say_what_lacks(splits, of_split, class_names)
    listing.report()
    if "validation" not in samples:
        samples = _divided(samples["train"], validation_share, seed)
    return FileSource(root.resolve().name, root, class_names, samples)


def validation_folder(root: Path) -> Path | None:
    """The folder of validation images in `root`; one named `test` is taken for want of another, which is said."""
    name = next((name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    if name == "test":
        log.warning(
            "%s: has no val/, so test/ is what training is validated with, and checkpoints are chosen by; to keep it "
            "apart, move it away, or put other images into val/",
            root,
        )
    return None if name is None else root / name


def _splits(listing: Listing) -> dict[str, Path]:
    root, names = listing.root, listing.folders(listing.root)
    if "train" not in names:
        if names and set(names) <= _SPLIT_NAMES:
            raise UserError(f"--from {root}: has {names[0]}/ but no train/; name the folder of training images so")
        return {"train": root}
    found = {"train": root / "train", "validation": validation_folder(root)}
    splits = {split: folder for split, folder in found.items() if folder is not None}
    used = [folder.name for folder in splits.values()]
    if others := [f"{name}/" for name in names if name not in used]:
        log.warning("%s: %s not used, only %s", root, ", ".join(others), " and ".join(f"{name}/" for name in used))
    for folder in splits.values():
        listing.allow(folder)
    return splits


def _say_what_lacks(
    splits: Mapping[str, Path], of_split: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> None:
    for split, folder in splits.items():
        if missing := [name for name in class_names if name not in of_split[split]]:
            log.warning(
                "%s: has no images of %d of %d classes (%s); labels number all of them",
                folder,
                len(missing),
                len(class_names),
                ", ".join(missing[:8]),
            )


def _divided(samples: Sequence[tuple[int, Span]], share: float, seed: int) -> dict[str, list[tuple[int, Span]]]:
    parts = held_out([label for label, _ in samples], share, seed)
    return {split: [samples[i] for i in ids] for split, ids in parts.items()}
