"""Any folder with one folder of images per class."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from esam_dist.data.dataset import TEST
from esam_dist.data.decode import SUFFIXES
from esam_dist.data.prepare.files import FileSource, Span, class_files, class_name
from esam_dist.data.prepare.listing import Listing
from esam_dist.data.prepare.source import held_out
from esam_dist.errors import UserError

log = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "val", "valid", TEST)
_SPLIT_NAMES = {*VALIDATION_NAMES, "train", "training", "testing"}
_SHARE = 0.1
_NAMED = 8
_LOOKED_AT = 10_000

Samples = Sequence[tuple[int, Span]]


def folders(root: Path, *, validation_share: float | None, seed: int, limit: int | None = None) -> FileSource:
    """`root/CLASS/...`, divided by `validation_share` (0.1); or such folders in `root/train`, `root/val`, `root/test`.

    Labels number the classes of all splits, in order. `limit`: of each class so many images of each folder at most.
    """
    if not root.is_dir():
        raise UserError(f"--from {root}: no such folder; give a folder with one folder of images per class")
    listing = Listing(root)
    splits = _splits(listing, holds_out=validation_share is not None)
    of_split = {split: [class_name(name) for name in listing.folders(folder)] for split, folder in splits.items()}
    class_names = sorted({name for names in of_split.values() for name in names})
    samples = {split: class_files(listing, folder, class_names, limit) for split, folder in splits.items()}
    _say_what_lacks(splits, of_split, class_names)
    listing.report()
    if "validation" not in samples:
        share = _SHARE if validation_share is None else validation_share
        samples |= _divided(samples["train"], share, seed)
        _check_divided(splits["train"], samples, class_names, share)
    elif validation_share is not None:
        log.warning("%s: --validation-share is not used, as there is a validation folder", root)
    return FileSource(root.resolve().name, root, class_names, samples)


def has_class_folders(root: Path) -> bool:
    """Whether there are images in folders of `root`, or in folders of those."""
    found = itertools.chain(root.glob("[!.]*/*"), root.glob("[!.]*/[!.]*/*"))
    return any(path.suffix.lower() in SUFFIXES for path in itertools.islice(found, _LOOKED_AT))


def validation_folder(root: Path) -> Path | None:
    """The folder of validation images in `root`; one named `test` is taken for want of another, which is said."""
    name = next((name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    if name == TEST:
        log.warning(
            "%s: has no val/, so test/ is what training is validated with, and checkpoints are chosen by; to keep it "
            "apart, put other images into val/, or hold some of train/ out (`folder`: --validation-share %g)",
            root,
            _SHARE,
        )
    return None if name is None else root / name


def _splits(listing: Listing, *, holds_out: bool) -> dict[str, Path]:
    """The folder of each split; with `holds_out`, `test` stands for no validation."""
    root, names = listing.root, listing.folders(listing.root)
    if "train" not in names:
        if names and set(names) <= _SPLIT_NAMES:
            raise UserError(f"--from {root}: has {names[0]}/ but no train/; name the folder of training images so")
        return {"train": root}
    found: dict[str, Path | None] = {"train": root / "train"}
    if not (holds_out and set(names).isdisjoint(set(VALIDATION_NAMES) - {TEST})):
        found["validation"] = validation_folder(root)
    if TEST in names and root / TEST not in found.values():
        found[TEST] = root / TEST
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
                ", ".join(missing[:_NAMED]),
            )


def _divided(samples: Samples, share: float, seed: int) -> dict[str, list[tuple[int, Span]]]:
    parts = held_out([label for label, _ in samples], share, seed)
    return {split: [samples[i] for i in ids] for split, ids in parts.items()}


def _check_divided(folder: Path, samples: Mapping[str, Samples], class_names: Sequence[str], share: float) -> None:
    """Raise UserError when no image at all was held out; say which classes have none."""
    train, validation = (Counter(label for label, _ in samples[split]) for split in ("train", "validation"))
    most = max(train.values())
    if not validation and most == 1:
        raise UserError(
            f"--from {folder}: has one image of each class, so that none can be held out for validation; give two or "
            "more of a class, or folders train/ and val/"
        )
    if not validation:
        # Of n images round(n * share) are held out.
        enough = (50 // most + 1) / 100
        raise UserError(
            f"--validation-share {share:g}: holds out no image of classes of {most} images at most; give "
            f"{enough:g} or more, more images, or folders train/ and val/"
        )
    if missing := [name for label, name in enumerate(class_names) if not validation[label]]:
        log.warning(
            "%s: too few images of %d of %d classes for --validation-share %g to hold one out (%s)",
            folder,
            len(missing),
            len(class_names),
            share,
            ", ".join(missing[:_NAMED]),
        )
