"""ImageNet (ILSVRC 2012) from its original archives, which are read in place and never unpacked, or from class folders.

`ILSVRC2012_img_train.tar` holds one tar per class; `ILSVRC2012_img_val.tar` holds the validation images, whose labels
are in the devkit. Labels number the classes by WordNet id, in order, as everybody does.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from esam_dist.data.prepare.archives import read_files
from esam_dist.data.prepare.files import FileSource, Span, class_files
from esam_dist.data.prepare.folders import validation_folder
from esam_dist.data.prepare.listing import Listing
from esam_dist.data.tar import Member, members
from esam_dist.errors import UserError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def imagenet(root: Path) -> FileSource:
    """What is found in `root`: each split from its archive, or from the folders `train` and `val`."""
    if not root.is_dir():
        raise UserError(f"--from {root}: no such folder; give the folder of {TRAIN} or of train/ and val/")
    listing = Listing(root)
    if (root / TRAIN).is_file():
        by_class = _train_spans(root / TRAIN)
        wnids = tuple(sorted(by_class))
        train = [(label, span) for label, wnid in enumerate(wnids) for span in by_class[wnid]]
    else:
        folder = _given(root, root / "train", TRAIN)
        listing.allow(folder)
        wnids = listing.folders(folder)
        train = class_files(listing, folder, wnids)
    words: dict[str, str] = {}
    if (root / VALIDATION).is_file():
        words, truth = _devkit(root)
        validation = _validation_spans(root / VALIDATION, wnids, truth)
    else:
        folder = _given(root, validation_folder(root) or root / "val", VALIDATION)
        listing.allow(folder)
        validation = class_files(listing, folder, wnids)
    listing.report()
    class_names = [f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids]
    return FileSource("imagenet", root, class_names, {"train": train, "validation": validation})


def _train_spans(path: Path) -> dict[str, list[Span]]:
    """The images of every class: an inner tar lies in one piece, so its members have an offset in the outer file."""
    found: dict[str, list[Span]] = {}
    with path.open("rb") as file:
        for inner in _members(file, path):
            if inner.name.endswith(".tar"):
                images = _members(file, path, inner.offset, inner.offset + inner.size)
                found[PurePosixPath(inner.name).stem] = [_span(path, image) for image in images]
    if not found:
        raise UserError(f"--from {path}: holds no archives of classes (n01440764.tar, ...); give the original file")
    return found


def _validation_spans(path: Path, wnids: Sequence[str], truth: list[str]) -> list[tuple[int, Span]]:
    with path.open("rb") as file:
        images = sorted(
            (member for member in _members(file, path) if member.name.upper().endswith(".JPEG")),
            key=lambda member: member.name,
        )
    if len(images) != len(truth):
        raise UserError(f"--from {path}: holds {len(images)} images, but the devkit has {len(truth)} labels")
    if unknown := set(truth) - set(wnids):
        raise UserError(f"--from {path}: the devkit has the class {min(unknown)!r}, which {TRAIN} has not")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    return [(labels[wnid], _span(path, image)) for wnid, image in zip(truth, images, strict=True)]


def _span(path: Path, member: Member) -> Span:
    return Span(path, member.offset, member.size, "jpg")


def _members(file: IO[bytes], path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    try:
        yield from members(file, start, end)
    except tarfile.ReadError as error:
        raise UserError(f"--from {path}: is {error}; copy it again") from None


def _given(root: Path, folder: Path, archive: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"--from {root}: has neither {archive} nor {folder.name}/; put one of them there")
    return folder


def _devkit(root: Path) -> tuple[dict[str, str], list[str]]:
    """The first word for each WordNet id, and the WordNet id of each validation image, from the devkit."""
    path = next((root / name for name in DEVKITS if (root / name).is_file() or (root / name).is_dir()), None)
    if path is None:
        raise UserError(f"--from {root}: has {VALIDATION} but not {DEVKITS[0]}, which holds its labels; put it there")
    files = read_files(path, (_TRUTH, _META))
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(files[_META]), squeeze_me=True, struct_as_record=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        words = {str(row["WNID"]): str(row["words"]).split(",")[0] for row in rows}
        return words, [wnid_of[int(line)] for line in files[_TRUTH].split()]
    except Exception as error:
        # Damaged bytes can make scipy's reader raise anything.
        raise UserError(f"--from {path}: {_META} or {_TRUTH} is damaged ({error!r}); get it again") from None
