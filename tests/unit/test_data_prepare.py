"""`esam-dist prepare`: every source, deterministic, restartable, verified."""

import argparse
import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from esam_dist.data import prepare
from esam_dist.data.dataset import open_split
from esam_dist.data.prepare.write import PLAN
from esam_dist.errors import UserError


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(label: int, number: int, size=(40, 30)) -> Image.Image:
    """An image whose colour tells its label."""
    pixels = np.full((size[1], size[0], 3), 20 + 40 * label, np.uint8)
    pixels[: 1 + number % 5] = 255
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def labels_seen(root: Path, split: str) -> list[tuple[int, int]]:
    """For every sample its label, and the label that its colour tells."""
    opened = open_split(root, split)
    found = []
    for sample in range(opened.num_samples):
        pixels = np.asarray(Image.open(io.BytesIO(opened.read(sample))).convert("RGB"))
        found.append((opened.label(sample), round((int(pixels[-1, -1, 0]) - 20) / 40)))
    return found


def check(root: Path, counts: dict[str, list[int]]) -> None:
    """Counts as told, every label that of its image, and verify content."""
    splits = json.loads((root / "dataset.json").read_text())["splits"]
    assert {name: split["class_counts"] for name, split in splits.items()} == counts
    for name, expected in counts.items():
        seen = labels_seen(root, name)
        assert len(seen) == sum(expected)
        assert all(label == shown for label, shown in seen)
    run("verify", root, "--workers", 0)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for label, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir(parents=True)
        for number in range(20):
            (root / name / f"{number}.JPEG").write_bytes(jpeg(picture(label, number)))
    return root


def test_folder(folders, tmp_path):
    run("folder", tmp_path / "out", "--from", folders, "--validation-share", 0.25, "--samples-per-shard", 20)
    check(tmp_path / "out", {"train": [15, 15, 15], "validation": [5, 5, 5]})
    assert open_split(tmp_path / "out", "train").class_names == ["ant", "bee", "cat"]
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == 3


def test_folder_with_its_own_validation(folders, tmp_path):
    root = tmp_path / "both"
    root.mkdir()
    folders.rename(root / "train")
    (root / "val" / "bee").mkdir(parents=True)
    (root / "val" / "bee" / "x.png").write_bytes((root / "train" / "bee" / "3.JPEG").read_bytes())
    run("folder", tmp_path / "out", "--from", root)
    check(tmp_path / "out", {"train": [20, 20, 20], "validation": [0, 1, 0]})
    (root / "val" / "dog").mkdir()
    assert "has the class 'dog'" in refused("folder", tmp_path / "out2", "--from", root)


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_plain_webdataset(folders, tmp_path):
    run("folder", tmp_path / "out", "--from", folders, "--workers", 0)
    shard = tmp_path / "out" / "train" / "shard-000000.tar"
    dataset = webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    seen = [(label, round((int(pixels[-1, -1, 0]) - 20) / 40)) for pixels, label in dataset]
    assert seen == labels_seen(tmp_path / "out", "train")


def test_keeping_bytes_keeps_them_and_short_side_shrinks(folders, tmp_path):
    run("folder", tmp_path / "kept", "--from", folders, "--keep-bytes")
    originals = {path.read_bytes() for path in folders.rglob("*.JPEG")}
    kept = open_split(tmp_path / "kept", "train")
    assert all(kept.read(sample) in originals for sample in range(kept.num_samples))
    run("folder", tmp_path / "small", "--from", folders, "--short-side", 15, "--quality", 90)
    small = open_split(tmp_path / "small", "train")
    assert {Image.open(io.BytesIO(small.read(i))).size for i in range(small.num_samples)} == {(20, 15)}
    check(tmp_path / "small", {"train": [18, 18, 18], "validation": [2, 2, 2]})


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_input_and_seed_same_bytes_whatever_the_workers(folders, tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        run(
            "folder",
            tmp_path / name,
            "--from",
            folders,
            "--short-side",
            20,
            "--samples-per-shard",
            7,
            "--workers",
            workers,
        )
    run("folder", tmp_path / "other", "--from", folders, "--short-side", 20, "--samples-per-shard", 7, "--seed", 1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_a_killed_run_goes_on_and_keeps_its_shards(folders, tmp_path, monkeypatch):
    arguments = ["folder", tmp_path / "out", "--from", folders, "--samples-per-shard", 10, "--workers", 0]
    run("folder", tmp_path / "whole", "--from", folders, "--samples-per-shard", 10)
    from esam_dist.data.prepare import write

    real, written = write.write_shard, []

    def fails_at_the_fourth(path, samples, first_key):
        written.append(path)
        if len(written) == 4:
            path.with_suffix(".tar.part").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return real(path, samples, first_key)

    monkeypatch.setattr(write, "write_shard", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert (tmp_path / "out" / PLAN).exists()
    assert not (tmp_path / "out" / "dataset.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert len(kept) == 3
    run(*arguments)
    assert len(written) == 8  # six shards, one of validation, and the one that failed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_prepared_otherwise_is_not_mixed_up(folders, tmp_path):
    run("folder", tmp_path / "out", "--from", folders)
    before = contents(tmp_path / "out")
    run("folder", tmp_path / "out", "--from", folders)
    assert contents(tmp_path / "out") == before
    assert "holds data prepared otherwise" in refused("folder", tmp_path / "out", "--from", folders, "--seed", 1)
    (folders / "ant" / "new.jpg").write_bytes(jpeg(picture(0, 0)))
    assert "holds data prepared otherwise" in refused("folder", tmp_path / "out", "--from", folders)


def test_bad_images_are_left_out_of_a_re_encoded_set_and_counted(folders, tmp_path, caplog):
    (folders / "cat" / "5.JPEG").write_bytes(b"")
    (folders / "cat" / "6.JPEG").write_bytes((folders / "cat" / "6.JPEG").read_bytes()[:200])
    run("folder", tmp_path / "out", "--from", folders, "--short-side", 20, "--workers", 0)
    splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
    assert sum(split["left_out"] for split in splits.values()) == 2
    assert sum(split["class_counts"][2] for split in splits.values()) == 18
    assert "left out sample" in caplog.text


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


def test_imagenet_from_class_folders(folders, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    folders.rename(root / "train")
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


def test_verify_finds_what_is_wrong(folders, tmp_path):
    out = tmp_path / "out"
    (folders / "cat" / "6.JPEG").write_bytes((folders / "cat" / "6.JPEG").read_bytes()[:200])
    run("folder", out, "--from", folders)
    assert "1 faults in 60 samples, the first: " in refused("verify", out, "--workers", 2)
    run("folder", tmp_path / "twin", "--from", folders)
    shard = out / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd9", b"\xff\xd8", 1))
    assert "its checksum is not that of its index" in refused("verify", out, "--workers", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "needs --from PATH"),
        (["folder", "--from", "no-such-folder"], "no such folder"),
        (["imagenet", "--from", "no-such-folder"], "no such folder"),
        (["cifar10", "--from", "no-such-folder"], "no such file or folder"),
        (["digits", "--keep-bytes", "--short-side", "64"], "exclude each other"),
        (["digits", "--quality", "200"], "--quality 200 is out of range"),
        (["digits", "--short-side", "1"], "--short-side 1 is out of range"),
        (["folder", "--from", "x", "--validation-share", "1.5"], "--validation-share 1.5"),
        (["digits", "--seed", "-1"], "must not be negative"),
        (["verify"], "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, message):
    assert message in refused(arguments[0], tmp_path / "out", *arguments[1:])
