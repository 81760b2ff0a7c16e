"""ImageNet from its original archives, from class folders, and from what is damaged or has changed."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esam_dist.data.dataset import open_split
from tests.prepared import check, class_folders, flipped, jpeg, picture, refused, run, tar


def imagenet(root: Path, devkit: bool = True, shown: Sequence[int] = (2, 0, 1, 1, 0)) -> None:
    """A small imitation of the original archives: 3 classes; the devkit's numbers are not the alphabetical ones.

    `shown` are the validation images' labels.
    """
    from scipy.io import savemat

    root.mkdir()
    wnids = ["n01440764", "n01443537", "n02119789"]
    inner = {
        f"{wnid}.tar": tar({f"{wnid}_{number}.JPEG": jpeg(picture(label, number)) for number in range(6)})
        for label, wnid in enumerate(wnids)
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(dict(sorted(inner.items(), reverse=True))))
    images = {
        f"ILSVRC2012_val_{number + 1:08d}.JPEG": jpeg(picture(label, number)) for number, label in enumerate(shown)
    }
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(dict(reversed(images.items()))))
    ids = {"n02119789": 1, "n01440764": 2, "n01443537": 3}
    synsets = np.array(
        [(number, wnid, f"word of {wnid}, synonym") for wnid, number in ids.items()],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[wnids[label]]}\n" for label in shown)
    name = "ILSVRC2012_devkit_t12/data"
    members = {
        f"{name}/meta.mat": meta.getvalue(),
        f"{name}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    if devkit:
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar(members)))


def test_imagenet_from_the_original_archives(tmp_path):
    imagenet(tmp_path / "in")
    run("imagenet", tmp_path / "out", "--from", tmp_path / "in", "--samples-per-shard", 5)
    check(tmp_path / "out", {"train": [6, 6, 6], "validation": [2, 2, 1]})
    assert open_split(tmp_path / "out", "train").class_names[0] == "n01440764 word of n01440764"


def test_imagenet_from_class_folders(tmp_path):
    root = tmp_path / "in"
    class_folders(root / "train")
    (root / "val" / "cat").mkdir(parents=True)
    (root / "val" / "cat" / "x.JPEG").write_bytes(jpeg(picture(2, 0)))
    run("imagenet", tmp_path / "out", "--from", root)
    check(tmp_path / "out", {"train": [20, 20, 20], "validation": [0, 0, 1]})


def test_imagenet_re_encoded(tmp_path):
    imagenet(tmp_path / "in")
    run("imagenet", tmp_path / "out", "--from", tmp_path / "in", "--short-side", 15, "--workers", 2)
    check(tmp_path / "out", {"train": [6, 6, 6], "validation": [2, 2, 1]})
    small = open_split(tmp_path / "out", "validation")
    assert {Image.open(io.BytesIO(small.read(i))).size for i in range(small.num_samples)} == {(20, 15)}


ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def test_imagenet_without_devkit_is_refused(tmp_path):
    imagenet(tmp_path / "in", devkit=False)
    assert "devkit" in refused("imagenet", tmp_path / "out", "--from", tmp_path / "in")


@pytest.mark.parametrize("archive", ARCHIVES)
def test_imagenets_archives_cut_anywhere_are_refused(tmp_path, archive):
    imagenet(tmp_path / "in")
    path = tmp_path / "in" / archive
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip(b"\0")), 700):
        path.write_bytes(whole[:length])
        assert "cut short or damaged at byte" in refused("imagenet", tmp_path / "out", "--from", tmp_path / "in")


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_damaged_header_of_imagenets_archives_is_refused_also_that_of_an_inner_one(tmp_path, archive):
    imagenet(tmp_path / "in")
    path = tmp_path / "in" / archive
    whole = path.read_bytes()
    headers = [place - 257 for place in range(len(whole)) if whole.startswith(b"ustar", place)]
    assert len(headers) == {ARCHIVES[0]: 3 + 18, ARCHIVES[1]: 5}[archive]
    for place in headers:
        path.write_bytes(flipped(whole, place))
        message = refused("imagenet", tmp_path / "out", "--from", tmp_path / "in")
        assert f"{archive}: is cut short or damaged at byte {place};" in message


def test_a_restart_with_another_devkit_does_not_mix_its_labels_with_the_old_ones(tmp_path):
    imagenet(tmp_path / "in")
    imagenet(tmp_path / "other", shown=(2, 0, 1, 0, 1))
    run("imagenet", tmp_path / "out", "--from", tmp_path / "in")
    (tmp_path / "other" / DEVKIT).replace(tmp_path / "in" / DEVKIT)
    assert "prepared otherwise" in refused("imagenet", tmp_path / "out", "--from", tmp_path / "in")


def test_a_restart_from_other_class_folders_is_refused(tmp_path):
    root = tmp_path / "in"
    for split in ("train", "val"):
        class_folders(root / split)
    run("imagenet", tmp_path / "out", "--from", root)
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "dog")
    assert "prepared otherwise" in refused("imagenet", tmp_path / "out", "--from", root)


def unpacks_to(data: bytes, whole: bytes) -> bool:
    """Whether the change is in a bit that gzip does not use."""
    try:
        return gzip.decompress(data) == gzip.decompress(whole)
    except (OSError, EOFError, zlib.error):
        return False


def test_a_damaged_devkit_is_refused(tmp_path):
    imagenet(tmp_path / "in")
    path = tmp_path / "in" / DEVKIT
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        files = {Path(member.name).name: archive.extractfile(member).read() for member in archive}
    truth, meta = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
    damaged = [whole[: len(whole) // 2], whole[:-1], b"<html>", b""]
    damaged += [data for place in range(12, len(whole), 37) if not unpacks_to(data := flipped(whole, place), whole)]
    damaged += [tar(files | {truth: text}) for text in (b"99\n" * 5, b"one\n" * 5, b"2\n")]
    damaged += [tar(files | {meta: files[meta][:length]}) for length in (0, 100, 200, len(files[meta]) - 20)]
    damaged += [tar(files | {meta: b"x" * 400}), tar({truth: files[truth]})]
    for data in damaged:
        path.write_bytes(data)
        refused("imagenet", tmp_path / "out", "--from", tmp_path / "in")
