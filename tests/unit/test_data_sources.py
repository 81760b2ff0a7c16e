"""What `esam-dist prepare` reads: the archives of ImageNet, CIFAR and Fashion-MNIST, and shards of other programs."""

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from esam_dist.data.dataset import open_split
from tests.prepared import check, class_folders, jpeg, picture, refused, run, tar


def imagenet(root: Path, devkit: bool = True) -> None:
    """A small imitation of the original archives: 3 classes; the devkit's numbers are not the alphabetical ones."""
    from scipy.io import savemat

    root.mkdir()
    wnids = ["n01440764", "n01443537", "n02119789"]
    inner = {
        f"{wnid}.tar": tar({f"{wnid}_{number}.JPEG": jpeg(picture(label, number)) for number in range(6)})
        for label, wnid in enumerate(wnids)
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(dict(sorted(inner.items(), reverse=True))))
    shown = [2, 0, 1, 1, 0]
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


def test_imagenet_without_devkit_or_cut_short_is_refused(tmp_path):
    imagenet(tmp_path / "in", devkit=False)
    assert "devkit" in refused("imagenet", tmp_path / "out", "--from", tmp_path / "in")
    imagenet(tmp_path / "short")
    for archive in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        path = tmp_path / "short" / archive
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2 + 700])
        assert "cut short" in refused("imagenet", tmp_path / "out", "--from", tmp_path / "short")
        path.write_bytes(whole)


def cifar_batch(labels: list[int], key: bytes) -> bytes:
    rows = np.stack([np.full(3072, 20 + 40 * label, np.uint8) for label in labels])
    return pickle.dumps({b"data": rows, key: labels}, protocol=2)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_and_cifar100(tmp_path, packed):
    ten = {f"data_batch_{number}": cifar_batch([0, 1, number % 3], b"labels") for number in range(1, 6)}
    ten |= {"test_batch": cifar_batch([2, 1], b"labels")}
    ten |= {"batches.meta": pickle.dumps({b"label_names": [b"ant", b"bee", b"cat"]}, protocol=2)}
    hundred = {
        "train": cifar_batch([0, 1, 2, 2], b"fine_labels"),
        "test": cifar_batch([0], b"fine_labels"),
        "meta": pickle.dumps({b"fine_label_names": [b"ant", b"bee", b"cat"]}, protocol=2),
    }
    expected = {
        "cifar10": {"train": [6, 7, 2], "validation": [0, 1, 1]},
        "cifar100": {"train": [1, 1, 2], "validation": [1, 0, 0]},
    }
    for name, files in (("cifar10", ten), ("cifar100", hundred)):
        origin = tmp_path / name
        if packed:
            origin.write_bytes(gzip.compress(tar({f"{name}-python/{file}": data for file, data in files.items()})))
        else:
            origin.mkdir()
            for file, data in files.items():
                (origin / file).write_bytes(data)
        run(name, tmp_path / f"{name}-out", "--from", origin)
        check(tmp_path / f"{name}-out", expected[name])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    origin = tmp_path / "cifar"
    origin.mkdir()
    (origin / "meta").write_bytes(pickle.dumps({b"fine_label_names": Attack()}))
    assert "not a python batch" in refused("cifar100", tmp_path / "out", "--from", origin)
    assert not (tmp_path / "owned").exists()


def test_fashion_mnist_from_idx_files(tmp_path):
    origin = tmp_path / "idx"
    origin.mkdir()
    for stem, labels in (("train", [0, 1, 2, 3, 4, 5]), ("t10k", [2, 0])):
        images = np.stack([np.full((28, 28), 20 + 40 * label, np.uint8) for label in labels])
        header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
        (origin / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = bytes([0, 0, 8, 1]) + np.array([len(labels)], ">u4").tobytes()
        (origin / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(labels)))
    run("fashion-mnist", tmp_path / "out", "--from", origin)
    check(tmp_path / "out", {"train": [1] * 6 + [0] * 4, "validation": [1, 0, 1] + [0] * 7})
    (origin / "t10k-images-idx3-ubyte").unlink()
    assert "dataset-fashion-mnist" in refused("fashion-mnist", tmp_path / "out2", "--from", origin)


def foreign(root: Path, members: dict[str, bytes]) -> Path:
    """Shards as another program might write them: the order of members and the keys are its own."""
    for split in ("train", "validation"):
        (root / split).mkdir(parents=True)
        (root / split / "some-name-7.tar").write_bytes(tar(members))
    return root


def test_shards_of_another_program_are_indexed(tmp_path):
    members = {}
    for number, label in enumerate([0, 2, 1, 1]):
        members[f"folder/img_{number}.cls"] = str(label).encode() + b"\n"
        members[f"folder/img_{number}.jpeg"] = jpeg(picture(label, number))
        members[f"folder/img_{number}.json"] = b"{}"
    run("index", foreign(tmp_path / "out", members))
    check(tmp_path / "out", {"train": [1, 2, 1], "validation": [1, 2, 1]})


IMAGE = jpeg(picture(0, 0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": IMAGE}, "has not both an image and a .cls"),
        ({"a.cls": b"1"}, "holds no images"),
        ({"a.jpg": IMAGE, "a.cls": b"cat"}, "not a label"),
        ({"a.jpg": IMAGE, "a.cls": b"-1"}, "not a label"),
        ({"a.jpg": IMAGE, "a.cls": b""}, "not a label"),
        ({"a.jpg": IMAGE, "a.cls": b"99999999999"}, "not a label"),
        ({"a.jpg": IMAGE, "a.png": IMAGE, "a.cls": b"1"}, "the key 'a' is there twice"),
        ({"../../etc/a.jpg": IMAGE, "../../etc/a.cls": b"1"}, "points outside"),
        ({"/a.jpg": IMAGE, "/a.cls": b"1"}, "points outside"),
    ],
)
def test_bad_members_of_a_foreign_shard_are_named(tmp_path, members, message):
    assert message in refused("index", foreign(tmp_path / "out", members))


def test_a_truncated_foreign_shard_is_refused(tmp_path):
    root = foreign(tmp_path / "out", {"a.jpg": IMAGE * 3, "a.cls": b"1"})
    shard = root / "train" / "some-name-7.tar"
    shard.write_bytes(shard.read_bytes()[:900])
    assert "cut short" in refused("index", root)
