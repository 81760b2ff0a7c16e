"""metrics.jsonl on disks that refuse it, and with contents that nobody would expect."""

import errno
import json
import os

import pytest

from esam_dist.errors import UserError
from esam_dist.metrics import jsonl


class Full:
    """A file that takes `room` bytes, as a disk that is nearly full does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(bytes(data)[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def lines(tmp_path):
    lines = jsonl.JsonLines(tmp_path)
    yield lines
    lines.close()


@pytest.mark.parametrize("room", [0, 1, 20])
def test_rows_that_a_full_disk_refuses_come_later_whole_and_in_order(tmp_path, lines, caplog, room):
    lines.write("note", {"step": 1})
    lines._file = Full(lines._file, room)
    for step in (2, 3):
        lines.write("note", {"step": step})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()] == [1]
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    lines._file.room = 10_000
    lines.write("note", {"step": 4})
    assert [row["step"] for row in jsonl.read(tmp_path)] == [1, 2, 3, 4]


def test_rows_that_never_found_room_are_counted_at_the_end(lines, caplog):
    lines._file = Full(lines._file, 0)
    lines.write("note", {"step": 1})
    lines.close()
    assert "1 rows are lost" in caplog.text
    lines._waiting.clear()


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for use in (jsonl.JsonLines, jsonl.read, lambda folder: jsonl.rewind(folder, 3)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read and written \(Is a directory\)"):
            use(tmp_path)


def test_a_disk_that_refuses_the_rewind_is_one_line_and_loses_nothing(tmp_path, lines, monkeypatch):
    for step in (1, 2):
        lines.write("note", {"step": step})

    def refuse(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        jsonl.rewind(tmp_path, 1)
    assert [row["step"] for row in jsonl.read(tmp_path)] == [1, 2]


NO_ROWS = {
    "nested": b"[" * 1000,
    "nested mappings": b'{"step": ' * 100_000,
    "a list": b"[1]",
    "a number": b"3",
    "no step": b'{"kind": "note"}',
    "no kind": b'{"step": 1}',
    "a kind that is a number": b'{"kind": 3, "step": 1}',
    "a step that is text": b'{"kind": "note", "step": "1"}',
    "a step that is true": b'{"kind": "note", "step": true}',
    "no epoch": b'{"kind": "train", "step": 1}',
    "an epoch that is text": b'{"kind": "validation", "step": 1, "epoch": "1"}',
    "bytes": b"\xff\xfe\x00",
    "a number too long": b'{"kind": "note", "step": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_lines_that_are_no_rows_are_left_out_with_one_word(tmp_path, lines, caplog, name):
    lines.write("note", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(NO_ROWS[name] + b"\n")
    lines.write("note", {"step": 2})
    assert [row["step"] for row in jsonl.read(tmp_path)] == [1, 2]
    assert "1 of 3 lines are no rows" in caplog.text
    assert len(caplog.records) == 1
    assert jsonl.rewind(tmp_path, 2) == 1
    assert [row["step"] for row in jsonl.read(tmp_path)] == [1, 2]
