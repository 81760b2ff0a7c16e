"""`esam-dist prepare`: plain shards, deterministic, restartable, verified."""

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from esam_dist.data.dataset import SampleError, open_split
from esam_dist.data.jpeg import read_header
from esam_dist.data.prepare import write
from esam_dist.data.prepare.encode import Encoding, png
from esam_dist.data.prepare.write import PLAN
from tests.commands import alone, environment, here, wait_for
from tests.prepared import check, class_folders, contents, jpeg, labels_seen, picture, refused, run, tar


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


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_a_run_killed_at_once_goes_on_keeps_its_shards_and_gives_the_same_bytes(tmp_path):
    origin, out = class_folders(tmp_path / "pets", size=(1600, 1200)), tmp_path / "out"
    options = ["--from", origin, "--short-side", 60, "--samples-per-shard", 4, "--workers", 2]
    run("folder", tmp_path / "whole", *options)

    command = [sys.executable, "-m", "esam_dist", "prepare", "folder", out, *options]
    with subprocess.Popen(list(map(str, command)), env=environment(), stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: list(out.rglob("*.index")))
        workers = psutil.Process(killed.pid).children()
        killed.kill()
    assert (out / PLAN).exists()
    assert not (out / "dataset.json").exists()
    assert len(workers) == 2
    (out / "train" / ".shard-000001.tar.0badcafe.partial").write_bytes(b"half a shard")
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.index")}
    answer = alone("prepare", "folder", out, *options)
    assert answer.status == 0, answer.err
    assert all(map(ended, workers))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_what_is_finished_is_kept(tmp_path):
    origin, out = class_folders(tmp_path / "pets", size=(1600, 1200)), tmp_path / "out"
    options = ["--from", origin, "--short-side", 60, "--samples-per-shard", 4, "--workers", 2]
    command = list(map(str, [sys.executable, "-m", "esam_dist", "prepare", "folder", out, *options]))
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as running:
        wait_for(lambda: list(out.rglob("*.index")))
        psutil.Process(running.pid).children()[0].kill()
        told = running.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert running.returncode == 2
    assert told == (
        "esam-dist: error: --workers 2: one of them was killed, perhaps for memory; "
        "use fewer (what is finished is kept)"
    )
    assert list(out.rglob("*.index"))


def test_progress_tells_how_long_it_still_takes(folders, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    # A clock on which every shard takes 12 seconds.
    monkeypatch.setattr(write, "time", SimpleNamespace(monotonic=itertools.count(0, 12).__next__))
    run("folder", tmp_path / "out", "--from", folders, "--samples-per-shard", 18, "--workers", 0)
    said = [record.getMessage() for record in caplog.records if "left" in record.getMessage()]
    assert said == [
        "18 of 60 images, 1 images/s, 56 s left",
        "36 of 60 images, 1 images/s, 24 s left",
        "54 of 60 images, 1 images/s, 5 s left",
        "60 of 60 images, 1 images/s, 0 s left",
    ]


def test_a_folder_prepared_otherwise_is_not_mixed_up(folders, tmp_path):
    run("folder", tmp_path / "out", "--from", folders)
    before = contents(tmp_path / "out")
    run("folder", tmp_path / "out", "--from", folders)
    assert contents(tmp_path / "out") == before
    assert "holds data prepared otherwise" in refused("folder", tmp_path / "out", "--from", folders, "--seed", 1)
    for name in ("aaa", "zzz"):
        (folders / "ant").rename(folders / name)
        assert "holds data prepared otherwise" in refused("folder", tmp_path / "out", "--from", folders)
        (folders / name).rename(folders / "ant")
    (folders / "ant" / "new.jpg").write_bytes(jpeg(picture(0, 0)))
    assert "holds data prepared otherwise" in refused("folder", tmp_path / "out", "--from", folders)


@pytest.mark.parametrize("options", [[], ["--short-side", 20], ["--restart-markers"]])
def test_bad_images_are_left_out_named_and_counted(folders, tmp_path, caplog, options):
    if "--restart-markers" in options and shutil.which("jpegtran") is None:
        pytest.skip("jpegtran is not installed")
    (folders / "cat" / "5.JPEG").write_bytes(b"")
    (folders / "cat" / "6.JPEG").write_bytes((folders / "cat" / "6.JPEG").read_bytes()[:200])
    (folders / "bee" / "\n7.png").write_bytes(b"<html>please log in</html>")
    run("folder", tmp_path / "out", "--from", folders, "--workers", 0, *options)
    splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
    assert sum(split["left_out"] for split in splits.values()) == 3
    assert [sum(split["class_counts"][label] for split in splits.values()) for label in range(3)] == [20, 20, 18]
    said = sorted(record.getMessage() for record in caplog.records if "left out" in record.getMessage())
    sums = [line for line in said if line.startswith(str(tmp_path))]
    assert sum(int(re.search(r"out: (\d) of \d+ images of \w+ were left out", line)[1]) for line in sums) == 3
    said = [line for line in said if line not in sums]
    assert len(said) == 3
    assert said[0].startswith(rf"left out {folders}/bee/\n7.png (undecodable: ")
    assert said[1] == f"left out {folders}/cat/5.JPEG (empty)"
    assert said[2].startswith(f"left out {folders}/cat/6.JPEG (undecodable: ")
    run("verify", tmp_path / "out", "--workers", 0)


SMALL = {
    "a small JPEG": (jpeg(picture(1, 1)), "jpg"),
    "a small PNG": png(picture(1, 1)),
    "a small grey PNG": png(picture(1, 1).convert("L")),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_image_is_kept_when_it_can_be_decoded_and_left_out_when_not(name):
    data, suffix = SMALL[name]
    assert Encoding(short_side=64)(data, suffix) == (data, suffix)
    for length in (len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(SampleError, match="undecodable"):
            Encoding(short_side=64)(data[:length], suffix)


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_restart_markers_change_no_pixel(options):
    picture_file = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(picture_file, "JPEG", quality=92, **options)
    data = picture_file.getvalue()
    for encoding in (Encoding(restart_markers=True), Encoding(short_side=256, restart_markers=True)):
        marked, suffix = encoding(data, "JPEG")
        assert (read_header(marked).restart, suffix) == (1, "JPEG")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(io.BytesIO(marked))))
        assert encoding(marked, "JPEG") == (marked, "JPEG")


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
def test_what_cannot_be_rewritten_is_stored_as_it_is(folders, tmp_path):
    encoding, whole = Encoding(restart_markers=True), jpeg(picture(1, 1))
    scan = whole.index(b"\xff\xda")
    # Bytes between two segments make libjpeg warn, and harm nothing.
    for data in (whole[:scan] + b"\0\1\2" + whole[scan:], png(picture(1, 1))[0]):
        assert encoding(data, "jpg") == (data, "jpg")
    for data in (whole[: len(whole) * 3 // 4], b"\xff\xd8\xff", b"no image"):
        with pytest.raises(SampleError, match="undecodable"):
            encoding(data, "jpg")
    run("folder", tmp_path / "marked", "--from", folders, "--restart-markers")
    marked = open_split(tmp_path / "marked", "train")
    assert {read_header(marked.read(sample)).restart for sample in range(marked.num_samples)} == {1}


def test_restart_markers_need_the_program_that_writes_them(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = refused("folder", tmp_path / "out", "--from", folders, "--restart-markers")
    assert "jpegtran is not installed" in told
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_0_or_with_2_and_one_line(folders, tmp_path):
    out = tmp_path / "out"
    assert here("prepare", "folder", out, "--from", folders).status == 0
    assert here("prepare", "verify", out).status == 0
    shard = out / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    answer = here("prepare", "verify", out)
    assert answer.status == 2
    assert answer.err.startswith("esam-dist: error: ")
    assert answer.err.count("\n") == 1


def test_verify_finds_what_is_wrong(folders, tmp_path):
    out, image = tmp_path / "out", jpeg(picture(0, 0))
    for split, stored in (("train", image), ("validation", image[:200])):
        (tmp_path / "foreign" / split).mkdir(parents=True)
        members = {"a.jpg": image, "a.cls": b"0", "b.jpg": stored, "b.cls": b"0"}
        (tmp_path / "foreign" / split / "0.tar").write_bytes(tar(members))
    run("index", tmp_path / "foreign")
    assert "1 faults in 4 samples, the first: " in refused("verify", tmp_path / "foreign", "--workers", 2)
    run("folder", out, "--from", folders)
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
        (["digits", "--keep-bytes", "--restart-markers"], "exclude each other"),
        (["digits", "--quality", "200"], "--quality 200 is out of range"),
        (["digits", "--short-side", "1"], "--short-side 1 is out of range"),
        (["folder", "--from", "x", "--validation-share", "1.5"], "--validation-share 1.5"),
        (["digits", "--seed", "-1"], "must not be negative"),
        (["verify"], "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, message):
    assert message in refused(arguments[0], tmp_path / "out", *arguments[1:])
