"""`prepare folder` from folders as they are found on disks: what tools leave, links, pipes, gaps, and subsets."""

import json
import os
from pathlib import Path

import pytest

from esam_dist.data.dataset import open_split
from tests.prepared import check, class_folders, jpeg, picture, refused, run

IMAGE = jpeg(picture(0, 0))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "pets")


def split_folders(root: Path, **splits: str) -> Path:
    """Folders of splits, with one folder for each letter: a class of two images, whose colour tells its place."""
    for split, classes in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                (root / split / name / f"{number}.jpg").write_bytes(jpeg(picture("abcd".index(name), number)))
    return root


def said(caplog, word: str) -> str:
    """The one line of the log that has `word` in it."""
    (line,) = (record.getMessage() for record in caplog.records if word in record.getMessage())
    assert line.isprintable()
    return line


TOOLS = [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", ".Trash-1000"]


@pytest.mark.parametrize("inside", ["", "cat"])
def test_folders_that_tools_leave_are_no_classes_and_their_images_none(pets, tmp_path, caplog, inside):
    for name in TOOLS:
        (pets / inside / name / "deeper").mkdir(parents=True)
        (pets / inside / name / "deeper" / "1.jpg").write_bytes(jpeg(picture(1, 1)))
        (pets / inside / name / "2.jpg").write_bytes(jpeg(picture(1, 1)))
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    check(tmp_path / "out", {"train": [18, 18, 18], "validation": [2, 2, 2]})
    line = said(caplog, "passed over")
    assert all(str(Path(inside) / name) in line for name in TOOLS)


def test_resource_forks_and_hidden_files_are_no_images(pets, tmp_path, caplog):
    for number in range(20):
        (pets / "ant" / f"._{number}.JPEG").write_bytes(b"\0\5\26\7fork")
    (pets / "bee" / ".hidden.jpg").write_bytes(IMAGE)
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    check(tmp_path / "out", {"train": [18, 18, 18], "validation": [2, 2, 2]})
    line = said(caplog, "passed over")
    assert "ant/._0.JPEG" in line
    assert "and 13 more" in line
    assert "left out" not in caplog.text


def test_images_outside_of_the_class_folders_are_said_to_be_passed_over(pets, tmp_path, caplog):
    (pets / "stray.jpg").write_bytes(IMAGE)
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    check(tmp_path / "out", {"train": [18, 18, 18], "validation": [2, 2, 2]})
    assert "in no class's folder: stray.jpg" in said(caplog, "passed over")


@pytest.mark.parametrize("content", [None, "notes.txt", "._1.jpg"])
@pytest.mark.parametrize("where", ["", "train", "val"])
def test_a_class_folder_without_images_is_refused_by_name(tmp_path, content, where):
    root = class_folders(tmp_path / "in") if not where else split_folders(tmp_path / "in", train="ab", val="ab")
    (root / where / "zebra").mkdir()
    if content:
        (root / where / "zebra" / content).write_bytes(b"x")
    message = refused("folder", tmp_path / "out", "--from", root)
    assert "the class folder 'zebra' holds no images; put images there, or remove it" in message


@pytest.mark.parametrize(
    ("train", "val", "counts", "told"),
    [
        ("abc", "bc", {"train": [2, 2, 2], "validation": [0, 2, 2]}, "val: has no images of 1 of 3 classes (a)"),
        ("bc", "abc", {"train": [0, 2, 2], "validation": [2, 2, 2]}, "train: has no images of 1 of 3 classes (a)"),
        ("ab", "bc", {"train": [2, 2, 0], "validation": [0, 2, 2]}, "train: has no images of 1 of 3 classes (c)"),
    ],
)
def test_labels_number_the_classes_of_both_splits(tmp_path, caplog, train, val, counts, told):
    root = split_folders(tmp_path / "in", train=train, val=val)
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)
    check(tmp_path / "out", counts)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["classes"] == ["a", "b", "c"]
    assert told in caplog.text


def test_folders_beside_those_of_the_splits_are_said_not_to_be_used(tmp_path, caplog):
    root = split_folders(tmp_path / "in", train="ab", val="ab", extra="d")
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)
    check(tmp_path / "out", {"train": [2, 2], "validation": [2, 2]})
    assert said(caplog, "not used") == f"{root}: extra/ not used, only train/ and val/"


def test_a_test_folder_that_becomes_the_validation_is_said_to(tmp_path, caplog):
    root = split_folders(tmp_path / "in", train="ab", test="ab")
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)
    check(tmp_path / "out", {"train": [2, 2], "validation": [2, 2]})
    assert "has no val/, so test/ is what training is validated with" in said(caplog, "test/")
    caplog.clear()
    (root / "test").rename(root / "val")
    run("folder", tmp_path / "out2", "--from", root, "--workers", 0)
    assert not caplog.records


def test_splits_without_a_training_set_are_no_classes(tmp_path):
    for splits in (["val", "test"], ["training", "validation"], ["valid"]):
        root = split_folders(tmp_path / splits[0], **dict.fromkeys(splits, "ab"))
        message = refused("folder", tmp_path / "out", "--from", root)
        assert "but no train/; name the folder of training images so" in message
    # Beside others, it is the name of a class.
    for name in ("val", "cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(IMAGE)
        (tmp_path / "in" / name / "2.jpg").write_bytes(IMAGE)
    run("folder", tmp_path / "out", "--from", tmp_path / "in", "--validation-share", 0.5, "--workers", 0)
    assert open_split(tmp_path / "out", "train").class_names == ["cat", "val"]


@pytest.mark.timeout(30)
def test_a_named_pipe_is_not_waited_for(pets, tmp_path, caplog):
    os.mkfifo(pets / "cat" / "x.jpg")
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    check(tmp_path / "out", {"train": [18, 18, 18], "validation": [2, 2, 2]})
    assert "no regular files: cat/x.jpg" in said(caplog, "passed over")


@pytest.mark.timeout(30)
def test_an_image_that_becomes_a_pipe_meanwhile_is_left_out(pets, tmp_path, monkeypatch):
    from esam_dist.data.prepare import command

    def replaced(*arguments, **values):
        source = listed(*arguments, **values)
        (pets / "cat" / "1.JPEG").unlink()
        os.mkfifo(pets / "cat" / "1.JPEG")
        return source

    listed = command.folders
    monkeypatch.setattr(command, "folders", replaced)
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
    assert sum(split["left_out"] for split in splits.values()) == 1


def test_a_link_out_of_the_folder_is_refused_by_name(pets, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(IMAGE)
    for target in (secret, "../../secret.jpg", "/etc/passwd", tmp_path / "nowhere.jpg"):
        (pets / "cat" / "x.jpg").symlink_to(target)
        message = refused("folder", tmp_path / "out", "--from", pets)
        assert "cat/x.jpg is a link to" in message
        assert "outside of the folder; copy what it shows there, or remove it" in message
        (pets / "cat" / "x.jpg").unlink()


def test_a_class_folder_that_is_a_link_out_of_the_folder_is_refused_by_name(pets, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "1.jpg").write_bytes(IMAGE)
    (pets / "dog").symlink_to(tmp_path / "private")
    assert "dog is a link to" in refused("folder", tmp_path / "out", "--from", pets)


def test_links_in_circles_are_passed_over(pets, tmp_path, caplog):
    (pets / "cat" / "x.jpg").symlink_to("y.jpg")
    (pets / "cat" / "y.jpg").symlink_to("x.jpg")
    (pets / "cat" / "deeper").symlink_to(pets / "cat")
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    check(tmp_path / "out", {"train": [18, 18, 18], "validation": [2, 2, 2]})
    assert "links to folders: cat/deeper" in caplog.text
    assert "no regular files: cat/x.jpg, cat/y.jpg" in caplog.text


def test_links_within_the_folder_are_images_and_the_folders_that_were_given_may_be_links(tmp_path):
    real = class_folders(tmp_path / "disk" / "pets")
    (real / "cat" / "x.jpg").symlink_to("3.JPEG")
    (real / "cat" / "broken.jpg").symlink_to("nothing.jpg")
    root = tmp_path / "in"
    root.mkdir()
    (root / "train").symlink_to(real)
    (root / "val").symlink_to("train")
    (tmp_path / "link").symlink_to(root)
    for number, origin in enumerate((root, tmp_path / "link")):
        run("folder", tmp_path / f"out{number}", "--from", origin, "--workers", 0)
        check(tmp_path / f"out{number}", {"train": [20, 20, 21], "validation": [20, 20, 21]})


def test_a_folder_named_like_an_image_is_a_folder(pets, tmp_path):
    (pets / "cat" / "x.jpg").mkdir()
    (pets / "cat" / "x.jpg" / "1.jpg").write_bytes(jpeg(picture(2, 1)))
    run("folder", tmp_path / "out", "--from", pets, "--workers", 0)
    check(tmp_path / "out", {"train": [18, 18, 19], "validation": [2, 2, 2]})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_refused_by_name(pets, tmp_path):
    (pets / "cat").chmod(0)
    assert "cat cannot be read" in refused("folder", tmp_path / "out", "--from", pets)
    (pets / "cat").chmod(0o755)


def images_of(out: Path) -> set[bytes]:
    found = set()
    for name in ("train", "validation"):
        split = open_split(out, name)
        found |= {split.read(sample) for sample in range(split.num_samples)}
    return found


def named_images(root: Path) -> Path:
    """Two classes of thirty images, each unlike the others."""
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for number in range(30):
            (root / name / f"{number:02}.jpg").write_bytes(jpeg(picture(label, number), comment=f"{name}{number}"))
    return root


def test_a_limit_takes_the_first_of_each_class_by_a_hash_of_their_names(tmp_path):
    root = named_images(tmp_path / "in")

    def taken(name: str, limit: int) -> set[bytes]:
        run("folder", tmp_path / name, "--from", root, "--limit-per-class", limit, "--workers", 0)
        return images_of(tmp_path / name)

    few, again, more, all_of_them = taken("few", 10), taken("again", 10), taken("more", 20), taken("all", 31)
    assert few == again
    assert [len(each) for each in (few, more, all_of_them)] == [20, 40, 60]
    assert few < more < all_of_them
    first = {(root / name / f"{number:02}.jpg").read_bytes() for name in ("ant", "bee") for number in range(10)}
    assert 2 < len(few & first) < 15
    check(tmp_path / "few", {"train": [9, 9], "validation": [1, 1]})
    # What is added pushes out no more than it takes the place of.
    (root / "ant" / "new.jpg").write_bytes(jpeg(picture(0, 3), comment="new"))
    assert len(taken("added", 10) & few) >= 19
    assert "holds data prepared otherwise" in refused("folder", tmp_path / "few", "--from", root)


def test_a_limit_holds_for_each_split(tmp_path):
    root = tmp_path / "in"
    class_folders(root / "train")
    class_folders(root / "val")
    run("folder", tmp_path / "out", "--from", root, "--limit-per-class", 3, "--workers", 0)
    check(tmp_path / "out", {"train": [3, 3, 3], "validation": [3, 3, 3]})


def test_a_limit_is_for_folders(tmp_path):
    assert "--limit-per-class is for `prepare folder`" in refused("digits", tmp_path, "--limit-per-class", 3)
    assert "--limit-per-class 0 is out of range" in refused("folder", tmp_path, "--limit-per-class", 0)
