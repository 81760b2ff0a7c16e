"""What `esam-dist prepare` reads: the archives of CIFAR and Fashion-MNIST, and shards of other programs."""

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esam_dist.data.prepare.arrays import DEBIAN_FASHION_MNIST, fashion_mnist
from tests.commands import here
from tests.prepared import check, flipped, jpeg, picture, refused, run, tar


def cifar_batch(labels: list[int], key: bytes) -> bytes:
    rows = np.stack([np.full(3072, 20 + 40 * label, np.uint8) for label in labels])
    return pickle.dumps({b"data": rows, key: labels}, protocol=2)


def cifar100_files(folder: Path, **others: bytes) -> Path:
    """A folder with few samples of two classes, and with `others` in place of the files of those names."""
    files = {name: cifar_batch([0, 1], b"fine_labels") for name in ("train", "test")}
    files |= {"meta": pickle.dumps({b"fine_label_names": [b"ant", b"bee"]})} | others
    (folder / "cifar").mkdir()
    for name, data in files.items():
        (folder / "cifar" / name).write_bytes(data)
    return folder / "cifar"


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
        # Images of 32 pixels stay as they are.
        answer = here("prepare", name, tmp_path / f"{name}-out", "--from", origin, "--short-side", 64)
        assert answer.status == 0, answer.err
        check(tmp_path / f"{name}-out", expected[name])


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("train", b""),
        ("train", b"<html>"),
        ("train", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)})),
        ("train", pickle.dumps({b"data": np.zeros((2, 30), np.uint8), b"fine_labels": [0, 1]})),
        ("train", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 7]})),
        ("train", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]})),
        ("train", pickle.dumps([1, 2])),
        ("meta", pickle.dumps({b"fine_label_names": 7})),
    ],
)
def test_damaged_python_batches_are_refused(tmp_path, file, data):
    refused("cifar100", tmp_path / "out", "--from", cifar100_files(tmp_path, **{file: data}))


def test_a_damaged_archive_of_python_batches_is_refused(tmp_path):
    folder = cifar100_files(tmp_path)
    origin = tmp_path / "cifar.tar.gz"
    whole = gzip.compress(tar({file.name: file.read_bytes() for file in folder.iterdir()}))
    for data in [whole[:50], whole[:-9], b"", *(flipped(whole, place) for place in range(12, len(whole), 17))]:
        origin.write_bytes(data)
        refused("cifar100", tmp_path / "out", "--from", origin)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    origin = cifar100_files(tmp_path, meta=pickle.dumps({b"fine_label_names": Attack()}))
    assert "not a python batch" in refused("cifar100", tmp_path / "out", "--from", origin)
    assert not (tmp_path / "owned").exists()


def idx_files(origin: Path) -> Path:
    origin.mkdir()
    for stem, labels in (("train", [0, 1, 2, 3, 4, 5]), ("t10k", [2, 0])):
        images = np.stack([np.full((28, 28), 20 + 40 * label, np.uint8) for label in labels])
        header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
        (origin / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = bytes([0, 0, 8, 1]) + np.array([len(labels)], ">u4").tobytes()
        (origin / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(labels)))
    return origin


def test_fashion_mnist_from_idx_files(tmp_path):
    origin = idx_files(tmp_path / "idx")
    run("fashion-mnist", tmp_path / "out", "--from", origin)
    check(tmp_path / "out", {"train": [1] * 6 + [0] * 4, "validation": [1, 0, 1] + [0] * 7})
    (origin / "t10k-images-idx3-ubyte").unlink()
    assert "dataset-fashion-mnist" in refused("fashion-mnist", tmp_path / "out2", "--from", origin)


def test_damaged_idx_files_are_refused(tmp_path):
    origin = idx_files(tmp_path / "idx")
    packed, plain = origin / "train-labels-idx1-ubyte.gz", origin / "train-images-idx3-ubyte"
    for path in (packed, plain):
        whole = path.read_bytes()
        # Behind the headers, every byte of a plain file is some image.
        places = range(16) if path == plain else range(10, len(whole))
        for data in [b"", whole[:3], whole[:10], whole[:-1], *(flipped(whole, place) for place in places)]:
            path.write_bytes(data)
            refused("fashion-mnist", tmp_path / "out", "--from", origin)
        path.write_bytes(whole)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debians_package_is_found():
    source = fashion_mnist(None)
    counts = {split: np.bincount(labels).tolist() for split, labels in source.labels.items()}
    assert counts == {"train": [6000] * 10, "validation": [1000] * 10}
    assert Image.open(io.BytesIO(source.read("validation", 0)[0])).size == (28, 28)


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
        ({"a.jpg": IMAGE, "a.cls": b"1000000"}, "not a label"),
        ({"a.jpg": IMAGE, "a.cls": b"2000000000"}, "not a label"),
        ({"a.jpg": IMAGE, "a.cls": b"9" * 5000}, "not a label"),
        ({"a.jpg": IMAGE, "a.png": IMAGE, "a.cls": b"1"}, "the key 'a' is there twice"),
        ({"../../etc/a.jpg": IMAGE, "../../etc/a.cls": b"1"}, "points outside"),
        ({"/a.jpg": IMAGE, "/a.cls": b"1"}, "points outside"),
    ],
)
def test_bad_members_of_a_foreign_shard_are_named(tmp_path, members, message):
    assert message in refused("index", foreign(tmp_path / "out", members))


def test_labels_belong_to_keys_whatever_the_order_of_members(tmp_path):
    members = {f"{key}.jpg": jpeg(picture(label, 0)) for key, label in (("b", 2), ("a", 1), ("c", 0))}
    members |= {"a.CLS": b"1", "c.cls": b" 000 ", "b.cls": b"02"}
    run("index", foreign(tmp_path / "out", members))
    check(tmp_path / "out", {"train": [1, 1, 1], "validation": [1, 1, 1]})


def test_a_foreign_shard_that_is_cut_anywhere_is_refused(tmp_path):
    samples = {f"{key}.{suffix}": data for key in "abc" for suffix, data in (("jpg", IMAGE), ("cls", b"1"))}
    root = foreign(tmp_path / "out", samples)
    shard = root / "train" / "some-name-7.tar"
    whole = shard.read_bytes()
    # Inside of data, inside of a header (every 512 bytes one begins), and between them.
    for length in range(0, len(whole.rstrip(b"\0")) + 512, 128):
        shard.write_bytes(whole[:length])
        assert "cut short or damaged at byte" in refused("index", root)
