"""Indexes and descriptions that lie, or were made to break their reader: one line, and never a wrong label."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esam_dist.data import open_validation
from esam_dist.data.dataset import SampleError, open_split
from esam_dist.data.open_files import check_open_files
from esam_dist.data.prepare.write import PLAN
from esam_dist.data.shards import ENTRY
from esam_dist.errors import UserError
from tests.commands import here
from tests.prepared import check, class_folders, jpeg, picture, refused, run, tar
from tests.unit.test_data_loader import CPU, batches, settings, train

SHARD = "shard-000001"


def told(copy: Path) -> str:
    """The one line that refuses a prepared set."""
    with pytest.raises(UserError) as caught:
        open_split(copy, "train")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def rewrite(copy: Path, change: Callable[[Any], None], split: str = "train") -> None:
    """Change the entries of an index, with a checksum that fits: as a faulty program writes it, or an attacker."""
    path = copy / split / f"{SHARD if split == 'train' else 'shard-000000'}.index"
    line, _, body = path.read_bytes().partition(b"\n")
    entries = np.frombuffer(body, ENTRY).copy()
    change(entries)
    head = json.loads(line) | {"entries_sha256": hashlib.sha256(entries.tobytes()).hexdigest()}
    path.write_bytes(json.dumps(head).encode() + b"\n" + entries.tobytes())


def describe(copy: Path, change: Callable[[Any], None]) -> None:
    path = copy / "dataset.json"
    described = json.loads(path.read_bytes())
    change(described)
    path.write_text(json.dumps(described))


def put(field: str, place: int, value: int) -> Callable[[Any], None]:
    def change(entries: Any) -> None:
        entries[field][place] = value

    return change


@pytest.mark.parametrize("place", [0, 50, -1])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("offset", value) for value in (-(2**63), -512, 0, 511, 513, 1 << 40, 2**63 - 1)),
        *(("length", value) for value in (-1, -(2**31), 2**31 - 1)),
    ],
)
def test_an_index_that_leads_out_of_its_shard_is_refused(copy, field, value, place):
    rewrite(copy, put(field, place, value))
    assert f"{SHARD}.index does not match {SHARD}.tar" in told(copy)


@pytest.mark.parametrize("depth", [1_000, 100_000])
@pytest.mark.parametrize("text", ["[", '{"a":'])
def test_json_that_is_nested_deep_is_damaged(copy, depth, text):
    index = copy / "train" / f"{SHARD}.index"
    whole = index.read_bytes()
    index.write_bytes(text.encode() * depth + b"\n" + whole)
    assert f"{SHARD}.index is damaged" in told(copy)
    index.write_bytes(whole)
    for name in ("dataset.json", PLAN):
        (copy / name).write_text(text * depth)
        assert f"({name}); delete it or choose another" in refused("digits", copy)
        (copy / name).unlink()
    (copy / "dataset.json").write_text(text * depth)
    assert "dataset.json is damaged" in told(copy)


@pytest.mark.parametrize("digits_of", [4_000, 5_000])
def test_an_integer_of_thousands_of_digits_is_told_in_a_short_line(copy, digits_of):
    index = copy / "train" / f"{SHARD}.index"
    whole = index.read_bytes()
    for key in (b"samples", b"bytes"):
        index.write_bytes(whole.replace(b'"%s": ' % key, b'"%s": %s' % (key, b"9" * digits_of), 1))
        told(copy)
    index.write_bytes(whole)
    for key in ("samples", "left_out"):
        text = (copy / "dataset.json").read_text()
        (copy / "dataset.json").write_text(text.replace(f'"{key}": ', f'"{key}": ' + "9" * digits_of, 1))
        assert key == "left_out" or told(copy)
        (copy / "dataset.json").write_text(text)


@pytest.mark.parametrize("value", [360.0, True, "360", None, [360], float("nan")])
def test_a_head_of_an_index_that_holds_no_integers_is_damaged(copy, value):
    path = copy / "train" / f"{SHARD}.index"
    line, _, body = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(line) | {"samples": value}).encode() + b"\n" + body)
    assert f"{SHARD}.index is damaged" in told(copy)


@pytest.mark.parametrize(
    "name",
    ["a\0b.tar", "a\nb.tar", "a\x1b[2J.tar", "", ".", "..", "../train/shard-000001.tar", "/a.tar", "x/", "n" * 5000],
)
def test_a_name_in_the_description_that_is_no_files_is_refused(copy, name):
    describe(copy, lambda described: described["splits"]["train"]["shards"][1].update(file=name))
    assert f"lists {name[:80]!r}, which is no name of a shard" in told(copy)


def thrice(described: Any) -> None:
    split = described["splits"]["train"]
    first, *others = split["shards"]
    split["shards"] = [first] * 3 + others


@pytest.mark.parametrize("under_other_names", [False, True])
def test_a_shard_that_is_listed_three_times_is_refused(copy, under_other_names):
    labels = open_split(copy, "train").entries["label"][:360]

    def change(described: Any) -> None:
        thrice(described)
        split = described["splits"]["train"]
        split["class_counts"] = (np.array(split["class_counts"]) + 2 * np.bincount(labels, minlength=10)).tolist()
        split["samples"] += 2 * 360
        for number in (1, 2) if under_other_names else ():
            split["shards"][number] = split["shards"][number] | {"file": f"copy-{number}.tar"}
            for suffix in ("tar", "index"):
                shutil.copy(copy / "train" / f"shard-000000.{suffix}", copy / "train" / f"copy-{number}.{suffix}")

    describe(copy, change)
    assert "lists the same shard twice" in told(copy)
    answer = here("prepare", "verify", copy)
    assert (answer.status, answer.err.count("\n")) == (2, 1)


def test_numbers_of_samples_in_the_description_are_those_of_the_shards(copy):
    describe(copy, lambda described: described["splits"]["train"].update(samples=7))
    assert "samples or class_counts of dataset.json" in told(copy)
    describe(copy, lambda described: described["splits"]["train"]["shards"][1].update(samples=7))
    assert f"{SHARD}.tar is not the shard that dataset.json lists" in told(copy)


def exchanged(entries: Any, first: int, last: int) -> None:
    """The images of some samples in reversed order, with the labels where they were."""
    for field in ("offset", "length", "crc32"):
        entries[field][first:last] = entries[field][first:last][::-1].copy()


def test_an_index_of_exchanged_labels_trains_on_no_wrong_label(copy, digits):
    known = batches(settings(digits, batch_size=1438), 0, 1)[0]
    pairs = {(image.numpy().tobytes(), int(label)) for image, label in zip(known.images, known.labels, strict=True)}
    rewrite(copy, lambda entries: exchanged(entries, 20, 340))
    data = train(settings(copy, batch_size=1438, max_skipped=1.0))
    batch = next(data.batches(0))
    assert {(i.numpy().tobytes(), int(k)) for i, k in zip(batch.images, batch.labels, strict=True)} <= pairs
    assert set(data.skipped) == {"label"}
    assert 250 < data.skipped["label"] < 320
    with pytest.raises(UserError, match=r"data\.max_skipped = 0\.01: .*\(label\)"):
        list(islice(train(settings(copy)).batches(0), 45))


def test_an_index_of_exchanged_labels_is_refused_at_once_where_its_ends_show_it(copy):
    rewrite(copy, lambda entries: exchanged(entries, 0, 360))
    assert f"{SHARD}.index does not match {SHARD}.tar" in told(copy)


def test_an_index_that_takes_labels_for_images_is_refused(copy):
    def labels_for_images(entries: Any) -> None:
        entries["offset"] += -(-entries["length"] // 512) * 512 + 512
        entries["length"] = 1

    rewrite(copy, labels_for_images)
    assert f"{SHARD}.index does not match {SHARD}.tar" in told(copy)


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_labels_are_compared_on_either_side_of_an_image(tmp_path, label_first, between):
    """Where they do not lie beside it, they are not looked for."""
    members: dict[str, bytes] = {}
    for number in range(8):
        image = (f"x/{number}.0.JPEG", jpeg(picture(number % 4, number)))
        sample = [(f"x/{number}.0.cls", b" 0%d\n" % (number % 4)), image]
        if between:
            sample.insert(1, (f"x/{number}.0.json", b"{}"))
        members |= dict(sample if label_first else sample[::-1])
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{SHARD if split == 'train' else 'shard-000000'}.tar").write_bytes(tar(members))
    run("index", tmp_path)
    run("verify", tmp_path, "--workers", 0)
    rewrite(tmp_path, lambda entries: exchanged(entries, 2, 6))
    split = open_split(tmp_path, "train")
    seen = []
    for sample in range(8):
        with contextlib.suppress(SampleError):
            split.read(sample)
            seen.append(sample)
    assert seen == (list(range(8)) if between else [0, 1, 6, 7])
    assert "its images or labels are not those of its index" in refused("verify", tmp_path, "--workers", 0)


def test_a_label_of_more_than_a_block_is_not_compared_with_a_part_of_it(tmp_path):
    members = {
        "a.jpg": jpeg(picture(0, 0)),
        "a.cls": b"0" * 600,
        "b.cls": b" " * 600 + b"1",
        "b.jpg": jpeg(picture(1, 0)),
    }
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.tar").write_bytes(tar(members))
    run("index", tmp_path)
    check(tmp_path, {"train": [1, 1], "validation": [1, 1]})


def foreign(root: Path, labels: dict[str, list[int]]) -> Path:
    for split, own in labels.items():
        (root / split).mkdir(parents=True)
        parts = [{f"{n}.jpg": jpeg(picture(0, n)), f"{n}.cls": b"%d" % label} for n, label in enumerate(own)]
        (root / split / "a.tar").write_bytes(tar({name: data for part in parts for name, data in part.items()}))
    return root


@pytest.mark.parametrize(
    ("labels", "highest", "missing"),
    [
        ({"train": [0, 1, 999_999], "validation": [0]}, 999_999, 2),
        ({"train": [0, 1], "validation": [0, 3]}, 3, 2),
        ({"train": [1, 2], "validation": [1]}, 2, 0),
    ],
)
def test_labels_with_a_gap_are_refused_unless_the_number_of_classes_is_given(tmp_path, labels, highest, missing):
    root = foreign(tmp_path / "out", labels)
    message = refused("index", root)
    assert f"a.tar: has the label {highest}, but no sample of any shard has the label {missing};" in message
    assert "--num-classes" in message
    assert f"has the label {highest}" in refused("index", root, "--num-classes", highest)
    assert not (root / "dataset.json").exists()
    run("index", root, "--num-classes", highest + 1)
    assert len(open_split(root, "train").class_names) == highest + 1
    run("verify", root, "--workers", 0)


def test_classes_that_only_the_validation_shows_are_no_gap(tmp_path):
    run("index", foreign(tmp_path / "out", {"train": [0, 2], "validation": [1]}))
    assert len(open_split(tmp_path / "out", "train").class_names) == 3


def test_the_number_of_classes_is_for_indexing(tmp_path):
    assert "--num-classes is for `prepare index`" in refused("digits", tmp_path, "--num-classes", 10)
    assert "--num-classes 0 is out of range" in refused("index", tmp_path, "--num-classes", 0)


def test_a_shard_whose_name_cannot_be_printed_is_refused_before_it_is_described(tmp_path):
    root = foreign(tmp_path / "out", {"train": [0], "validation": [0]})
    (root / "train" / "a.tar").rename(root / "train" / "a\nb.tar")
    assert r"the shard 'a\nb.tar' has no name that can be printed; rename it" in refused("index", root)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["dataset.json", "train/shard-000001.index", "train/shard-000001.tar"])
def test_a_named_pipe_in_a_prepared_set_is_not_waited_for(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert "data.path" in told(copy)


@pytest.mark.timeout(20)
def test_a_named_pipe_among_shards_to_index_is_not_waited_for(tmp_path):
    root = foreign(tmp_path / "out", {"train": [0], "validation": [0]})
    os.mkfifo(root / "train" / "b.tar")
    assert "b.tar: cannot be read (no regular file)" in refused("index", root)


@contextlib.contextmanager
def open_files(limit: int):
    """So few files that may be open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_few_open_files_are_one_line_that_says_how_to_have_more(copy, tmp_path, workers):
    origin, lines = class_folders(tmp_path / "pets"), []
    num_open = len(os.listdir("/proc/self/fd"))
    for limit in (16, num_open + 8):
        with open_files(limit):
            lines.append(refused("verify", copy, "--workers", workers))
            lines.append(refused("folder", tmp_path / "out", "--from", origin, "--workers", workers))
            for opened in (train, lambda cfg: open_validation(cfg, rank=0, world_size=1, device=CPU)):
                with pytest.raises(UserError, match=rf"data\.workers = {workers}: needs \d+ more open files") as caught:
                    opened(settings(copy, workers=workers))
                lines.append(str(caught.value))
    assert all("ulimit -n" in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("limit", [4096, resource.RLIM_INFINITY])
def test_where_open_files_cannot_be_counted_or_are_not_limited_nothing_is_refused(monkeypatch, limit):
    def none_such(path):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr("os.listdir", none_such)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    check_open_files(2, "data.workers")


def test_few_open_files_are_enough_for_many_shards(tmp_path):
    run("digits", tmp_path, "--samples-per-shard", 8, "--workers", 0)
    with open_files(len(os.listdir("/proc/self/fd")) + 40):
        data = train(settings(tmp_path))
        assert all(len(batch.labels) == 32 for batch in islice(data.batches(0), 45))
        assert data.skipped == {}
        data.close()
