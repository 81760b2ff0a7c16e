"""Files that are whole or not there: whoever dies, and whatever the disk refuses, in between."""

import errno
import os
from pathlib import Path

import pytest

from esam_dist import files


class Killed(BaseException):
    """What stands for the end of the process."""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    return path


def test_the_content_is_replaced_and_nothing_else_is_left(path):
    files.write_file(path, "new \u00e9")
    assert path.read_bytes() == "new \u00e9".encode()
    files.write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_file_and_folder_are_on_the_disk_before_and_after_the_rename(path, monkeypatch):
    done, replace = [], Path.replace

    def note_replace(self, target):
        done.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(Path, "replace", note_replace)
    files.write_file(path, "new")
    assert done[0].startswith(str(path.parent / ".config.yaml."))
    assert done[1:] == ["replace", str(path.parent)]


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_whatever_comes_between_the_old_content_stays(path, monkeypatch, owner, name, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error)):
        files.write_file(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_block_did_not_finish_takes_no_place(path):
    def write_half():
        with files.replacing(path) as file:
            file.write(b"half")
            raise Killed

    with pytest.raises(Killed):
        write_half()
    assert path.read_text() == "old"


def test_two_writers_of_one_path_do_not_mix(path):
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_a_file_system_that_flushes_no_folders_is_taken_as_it_is(path, monkeypatch):
    def refuse(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_file(path, "new")
    assert path.read_text() == "new"


def test_what_a_killed_writer_left_is_removed(path):
    (path.parent / f".config.yaml.1234abcd{files.PARTIAL}").write_text("half")
    (path.parent / ".hidden").write_text("mine")
    files.remove_partial(path.parent)
    assert {entry.name for entry in path.parent.iterdir()} == {"config.yaml", ".hidden"}
