"""ImageNet (ILSVRC 2012) from its original archives, which are read in place and never unpacked, or from class folders.

`ILSVRC2012_img_train.tar` holds one tar per class; `ILSVRC2012_img_val.tar` holds the validation images, whose labels
are in the devkit. Labels number the classes by WordNet id, in order, as everybody does.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

from esam_dist.data.dataset import SampleError
from esam_dist.data.prepare.folders import VALIDATION_NAMES, class_files, read_file
from esam_dist.data.prepare.source import digest_of
from esam_dist.errors import UserError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


class Span(NamedTuple):
    """Bytes of a file: one image inside an archive, or a whole file of its own (length -1)."""

    path: Path
    offset: int
    length: int


class ImageNet:
    """What is found in `root`: each split from its archive, or from the folders `train` and `val`."""

    name = "imagenet"

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"--from {root}: no such folder; give the folder of {TRAIN} or of train/ and val/")
        self._spans: dict[str, list[Span]] = {}
        self.labels: dict[str, list[int]] = {}
        by_class = _train_spans(root / TRAIN) if (root / TRAIN).is_file() else _folder_spans(root, ("train",))
        wnids = sorted(by_class)
        self._put("train", [(label, span) for label, wnid in enumerate(wnids) for span in by_class[wnid]])
        words: dict[str, str] = {}
        if (root / VALIDATION).is_file():
            words, truth = _devkit(root)
            self._put("validation", _validation_spans(root / VALIDATION, wnids, truth))
        else:
            held = _folder_spans(root, VALIDATION_NAMES)
            if unknown := set(held) - set(wnids):
                raise UserError(f"--from {root}: validation has the class {min(unknown)!r}, which training has not")
            self._put("validation", [(wnids.index(wnid), span) for wnid, spans in held.items() for span in spans])
        self.class_names = tuple(f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids)
        self.digest = digest_of(
            f"{span.path.name} {span.offset} {span.length}" for spans in self._spans.values() for span in spans
        )

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """An image file. Raises SampleError when it is cut short."""
        span = self._spans[split][sample]
        if span.length < 0:
            return read_file(span.path)
        with span.path.open("rb") as file:
            data = os.pread(file.fileno(), span.length, span.offset)
        if len(data) != span.length or not data:
            raise SampleError("truncated", f"{span.path} at {span.offset}")
        return data, "jpg"

    def _put(self, split: str, samples: list[tuple[int, Span]]) -> None:
        self.labels[split] = [label for label, _ in samples]
        self._spans[split] = [span for _, span in samples]


def _train_spans(path: Path) -> dict[str, list[Span]]:
    """The images of every class: an inner tar lies in one piece, so its members have an offset in the outer file."""
    found: dict[str, list[Span]] = {}
    with path.open("rb") as file:
        for inner in _members(file, path, 0, path.stat().st_size):
            if inner.name.endswith(".tar"):
                start, end = inner.offset_data, inner.offset_data + inner.size
                images = _members(file, path, start, end)
                found[Path(inner.name).stem] = [Span(path, m.offset_data, m.size) for m in images]
    if not found:
        raise UserError(f"--from {path}: holds no archives of classes (n01440764.tar, ...); give the original file")
    return found


def _validation_spans(path: Path, wnids: list[str], truth: list[str]) -> list[tuple[int, Span]]:
    with path.open("rb") as file:
        members = sorted(_members(file, path, 0, path.stat().st_size), key=lambda member: member.name)
    images = [member for member in members if member.name.upper().endswith(".JPEG")]
    if len(images) != len(truth):
        raise UserError(f"--from {path}: holds {len(images)} images, but the devkit has {len(truth)} labels")
    if unknown := set(truth) - set(wnids):
        raise UserError(f"--from {path}: the devkit has the class {min(unknown)!r}, which {TRAIN} has not")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    return [(labels[w], Span(path, m.offset_data, m.size)) for w, m in zip(truth, images, strict=True)]


def _members(file: IO[bytes], path: Path, start: int, end: int) -> list[tarfile.TarInfo]:
    """The files of the tar that begins at `start`. Raises UserError when it is cut short."""
    file.seek(start)
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    members.append(member)
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name!r} goes beyond its end")
    except tarfile.TarError as error:
        raise UserError(f"--from {path}: is damaged or cut short ({error}); copy it again") from None
    return members


def _folder_spans(root: Path, names: tuple[str, ...]) -> dict[str, list[Span]]:
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"--from {root}: has neither {TRAIN if names[0] == 'train' else VALIDATION} nor {names[0]}/")
    wnids = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    files, labels = class_files(folder, wnids)
    found: dict[str, list[Span]] = {wnid: [] for wnid in wnids}
    for path, label in zip(files, labels, strict=True):
        found[wnids[label]].append(Span(path, 0, -1))
    return found


def _devkit(root: Path) -> tuple[dict[str, str], list[str]]:
    """The first word for each WordNet id, and the WordNet id of each validation image, from the devkit."""
    files = _devkit_files(root)
    from scipy.io import loadmat

    rows = loadmat(io.BytesIO(files[_META]), squeeze_me=True, struct_as_record=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    words = {str(row["WNID"]): str(row["words"]).split(",")[0] for row in rows}
    truth = [wnid_of[int(line)] for line in files[_TRUTH].split()]
    return words, truth


def _devkit_files(root: Path) -> dict[str, bytes]:
    archive, folder = (root / name for name in DEVKITS)
    if folder.is_dir():
        found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.name in (_TRUTH, _META)}
    elif archive.is_file():
        with tarfile.open(archive) as tar:
            members = [member for member in tar if Path(member.name).name in (_TRUTH, _META)]
            found = {Path(m.name).name: file.read() for m in members if (file := tar.extractfile(m)) is not None}
    else:
        raise UserError(f"--from {root}: has {VALIDATION} but not {archive.name}, which holds its labels; put it there")
    if set(found) != {_TRUTH, _META}:
        raise UserError(f"--from {root}: the devkit has not both {_TRUTH} and {_META}; get it again")
    return found
