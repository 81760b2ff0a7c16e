"""Tars and their indexes: what is cut short or damaged is told in one line, and not read as something else."""

import io
import json
import tarfile

import pytest

from esam_dist.checksum import sha256
from esam_dist.data.dataset import open_split
from esam_dist.data.shards import Sample, read_index, write_shard
from esam_dist.data.tar import BLOCK, member_name, members
from esam_dist.errors import UserError
from tests.commands import here
from tests.prepared import class_folders, contents, flipped, run, tar

# A name of more than 100 characters has a header of its own; an empty file has no data.
MEMBERS = {"a.jpg": b"x" * 700, f"{'n' * 150}.jpg": b"y" * BLOCK, "a.cls": b"1", "empty": b""}
WHOLE = tar(MEMBERS)


def names(data: bytes, start: int = 0, end: int | None = None) -> list[str]:
    return [member.name for member in members(io.BytesIO(data), start, end)]


def end_of_members() -> int:
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as archive:
        archive.getmembers()
        return archive.offset


def test_members_of_a_whole_tar_wherever_it_lies():
    assert names(WHOLE) == list(MEMBERS)
    assert names(b"j" * 1000 + WHOLE + b"k" * 1000, 1000, 1000 + len(WHOLE)) == list(MEMBERS)
    # The standard has two blocks of zeros at the end, and more as padding; one is enough to know it by.
    assert names(WHOLE[: end_of_members() + BLOCK]) == list(MEMBERS)
    assert names(bytes(BLOCK)) == []


def test_members_may_be_read_in_between():
    file = io.BytesIO(WHOLE)
    seen = {}
    for member in members(file):
        file.seek(member.offset)
        seen[member.name] = file.read(member.size)
    assert seen == MEMBERS


def test_names_of_members_are_printed_so_that_no_terminal_obeys_them():
    assert member_name(b"a\x1b[2J\n\xff.jpg" + bytes(90)) == r"a\x1b[2J\n\xff.jpg"


@pytest.mark.parametrize("before", [0, 3 * BLOCK])
def test_a_tar_that_is_cut_anywhere_is_told(before):
    for length in range(0, end_of_members() + BLOCK, 8):
        with pytest.raises(tarfile.ReadError, match=r"cut short or damaged at byte \d+$"):
            names(b"j" * before + WHOLE[:length], before)


@pytest.mark.parametrize("before", [0, 3 * BLOCK])
def test_a_damaged_header_is_told_with_its_place(before):
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as archive:
        offsets = [member.offset for member in archive]
    for offset in offsets:
        with pytest.raises(tarfile.ReadError, match=f"damaged at byte {before + offset}$"):
            names(b"j" * before + flipped(WHOLE, offset + 3), before)


@pytest.mark.parametrize("data", [b"", b"<html>" * 200, WHOLE + WHOLE, WHOLE + b"more"])
def test_what_is_no_tar_or_more_than_one_is_told(data):
    with pytest.raises(tarfile.ReadError, match="cut short or damaged"):
        names(data)


def test_a_member_of_negative_size_does_not_send_the_walk_in_circles():
    info = tarfile.TarInfo("b")
    info.size = -BLOCK
    negative = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(tarfile.ReadError, match=f"damaged at byte {end_of_members()}$"):
        names(WHOLE[: end_of_members()] + negative + bytes(2 * BLOCK))


def test_two_writers_of_one_shard_do_not_write_into_each_others_file(tmp_path):
    path = tmp_path / "train" / "shard-000000.tar"
    samples = [Sample(bytes([number]) * 3000, "jpg", number) for number in range(6)]

    def with_another_writer_in_the_middle():
        yield from samples[:3]
        write_shard(path, samples, 0)
        yield from samples[3:]

    info = write_shard(path, with_another_writer_in_the_middle(), 0)
    assert read_index(path)[0] == info
    assert sha256(path) == info.sha256
    assert {file.name for file in path.parent.iterdir()} == {path.name, "shard-000000.index"}


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield Sample(b"image", "jpg", 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "shard-000000.tar", failing(), 0)
    assert contents(tmp_path) == {}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    run("folder", root / "out", "--from", class_folders(root / "pets"), "--workers", 0)
    return root / "out"


@pytest.fixture
def restored(prepared):
    """The prepared set, as it was again after the test."""
    before = contents(prepared)
    yield prepared
    for name, data in before.items():
        (prepared / name).write_bytes(data)


def test_every_flipped_bit_of_an_index_is_told(restored):
    index = restored / "train" / "shard-000000.index"
    whole = index.read_bytes()
    for place in range(0, len(whole)):
        index.write_bytes(flipped(whole, place))
        with pytest.raises(UserError) as caught:
            open_split(restored, "train")
        assert "\n" not in str(caught.value)


def test_an_index_of_other_labels_is_told_by_the_counts_of_classes(restored):
    path = restored / "dataset.json"
    described = json.loads(path.read_bytes())
    described["splits"]["train"]["class_counts"] = [19, 17, 18]
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"class_counts of dataset\.json are not those of the shards of train"):
        open_split(restored, "train")


@pytest.mark.parametrize(
    "key", ["format", "classes", "splits", "splits train class_counts", "splits train shards", "splits train"]
)
@pytest.mark.parametrize("value", [None, 7, "seven", [7], {"a": 7}])
def test_a_damaged_description_is_told_in_one_line(restored, key, value):
    path = restored / "dataset.json"
    described = json.loads(path.read_bytes())
    *parents, last = key.split()
    inner = described
    for parent in parents:
        inner = inner[parent]
    inner.pop(last)
    if value is not None:
        inner[last] = value
    path.write_text(json.dumps(described))
    answer = here("prepare", "verify", restored)
    assert answer.status == 2
    assert answer.err.startswith("esam-dist: error: data.path = ")
    assert answer.err.count("\n") == 1
