"""`esam-dist prepare`: plain shards, deterministic, restartable, verified."""

import io
import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from esam_dist.data.dataset import open_split
from esam_dist.data.prepare.write import PLAN
from tests.prepared import check, class_folders, jpeg, labels_seen, picture, refused, run


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "pets")


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
