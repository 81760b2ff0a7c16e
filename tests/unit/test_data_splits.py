"""The splits of a prepared folder: a test split, what is held out, names in any script, and what else was meant."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch

from esam_dist.data import open_validation
from esam_dist.data.dataset import open_split
from esam_dist.data.keys import DataKeys
from esam_dist.data.prepare.source import held_out
from tests.commands import here
from tests.prepared import check, class_folders, jpeg, picture, refused, run, tar

CPU = torch.device("cpu")


def splits(root: Path, classes=("ant", "bee"), **counts: int) -> Path:
    """So many images of each class in each split."""
    for split, count in counts.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.jpg").write_bytes(jpeg(picture(label, number)))
    return root


def test_a_test_folder_beside_train_and_val_is_a_split_that_can_be_scored(tmp_path, caplog):
    root = splits(tmp_path / "in", train=4, val=2, test=3)
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)
    assert not caplog.records
    check(tmp_path / "out", {"train": [4, 4], "validation": [2, 2], "test": [3, 3]})
    data = open_validation(DataKeys(path=tmp_path / "out", workers=0), rank=0, world_size=1, device=CPU, split="test")
    assert sum(len(batch.labels) for batch in data.batches()) == 6


def test_verify_looks_into_the_test_split_too(tmp_path):
    out = tmp_path / "out"
    run("folder", out, "--from", splits(tmp_path / "in", train=4, val=2, test=3), "--workers", 0)
    shard = out / "test" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd9", b"\xff\xd8", 1))
    told = refused("verify", out, "--workers", 0)
    assert "test/shard-000000.tar: its checksum is not that of its index" in told
    assert f"delete {out} and prepare the data again" in told


def test_a_test_folder_stays_one_where_validation_is_held_out_of_train(tmp_path, caplog):
    root = splits(tmp_path / "in", train=4, test=3)
    run("folder", tmp_path / "held_out", "--from", root, "--validation-share", 0.25, "--workers", 0)
    assert not caplog.records
    check(tmp_path / "held_out", {"train": [3, 3], "validation": [1, 1], "test": [3, 3]})
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)
    check(tmp_path / "out", {"train": [4, 4], "validation": [3, 3]})
    assert "hold some of train/ out (`folder`: --validation-share 0.1)" in caplog.text
    caplog.clear()
    (root / "test").rename(root / "val")
    run("folder", tmp_path / "both", "--from", root, "--validation-share", 0.25, "--workers", 0)
    assert "--validation-share is not used, as there is a validation folder" in caplog.text


def test_shards_of_others_may_have_a_test_split(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").write_bytes(tar({"a.jpg": jpeg(picture(0, 0)), "a.cls": b"0"}))
    run("index", tmp_path)
    check(tmp_path, {"train": [1], "validation": [1], "test": [1]})


def test_a_broken_image_in_shards_of_others_has_a_remedy_that_helps(tmp_path):
    for split, image in (("train", jpeg(picture(0, 0))), ("validation", b"no image")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").write_bytes(tar({"a.jpg": image, "a.cls": b"0"}))
    run("index", tmp_path)
    told = refused("verify", tmp_path, "--workers", 0)
    assert "validation/0.tar:a.jpg: undecodable" in told
    assert told.endswith("; write these shards again, without what is named, and index them anew")


def test_evaluate_scores_the_test_split(tmp_path):
    run("folder", tmp_path / "data", "--from", splits(tmp_path / "in", train=8, val=2, test=3), "--workers", 0)
    settings = [f"run.folder={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}", "data.workers=0"]
    settings += ["data.batch_size=8", "data.image_size=16", "train.max_steps=1", "method.gamma=1"]
    assert here("train", "configs/digits_esam.yaml", *settings).status == 0
    told = here("evaluate", tmp_path / "run", "--split", "test")
    assert told.status == 0, told.err
    assert "over 6 samples" in told.out
    assert "over 4 samples" in here("evaluate", tmp_path / "run").out
    run("folder", tmp_path / "other", "--from", splits(tmp_path / "less", train=8, val=2), "--workers", 0)
    told = here("evaluate", tmp_path / "run", "--split", "test", f"data.path={tmp_path / 'other'}")
    assert told.status == 2
    assert "has no split 'test'; prepare a folder that has test/ beside train/ and val/" in told.err


@pytest.mark.parametrize(
    ("images", "options", "told"),
    [
        (1, [], "has one image of each class, so that none can be held out for validation; give two or more"),
        (1, ["--validation-share", 0.9], "has one image of each class"),
        (4, [], "--validation-share 0.1: holds out no image of classes of 4 images at most; give 0.13 or more"),
        (2, ["--validation-share", 0.2], "give 0.26 or more"),
    ],
)
def test_too_few_images_to_hold_any_out_are_said_to_be(tmp_path, images, options, told):
    root = splits(tmp_path, train=images)
    for origin in (root, root / "train"):
        assert told in refused("folder", tmp_path / "out", "--from", origin, *options)


def test_what_is_advised_for_few_images_helps(tmp_path):
    root = splits(tmp_path, train=4)
    run("folder", tmp_path / "out", "--from", root, "--validation-share", 0.13, "--workers", 0)
    check(tmp_path / "out", {"train": [3, 3], "validation": [1, 1]})


def test_classes_too_small_to_hold_one_out_are_named_and_all_stay_in_training(tmp_path, caplog):
    root = splits(tmp_path, train=8)
    for number in range(1, 8):
        (root / "train" / "bee" / f"{number}.jpg").unlink()
    run("folder", tmp_path / "out", "--from", root, "--validation-share", 0.6, "--workers", 0)
    check(tmp_path / "out", {"train": [3, 1], "validation": [5, 0]})
    assert "too few images of 1 of 2 classes for --validation-share 0.6 to hold one out (bee)" in caplog.text


def test_no_class_is_held_out_whole():
    parts = held_out([0, 1, 1, 2, 2, 2], 0.9, seed=0)
    assert sorted(parts["train"].tolist() + parts["validation"].tolist()) == list(range(6))
    assert len(parts["train"]) == 3


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "fashion-mnist", "imagenet"])
def test_class_folders_given_to_another_source_point_to_prepare_folder(tmp_path, source):
    root = class_folders(tmp_path / "pets")
    told = refused(source, tmp_path / "out", "--from", root)
    assert f"`esam-dist prepare folder {tmp_path / 'out'} --from {root}`" in told
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)


def test_an_empty_folder_points_nowhere(tmp_path):
    (tmp_path / "in").mkdir()
    assert "prepare folder" not in refused("cifar10", tmp_path / "out", "--from", tmp_path / "in")


SCRIPTS = ("Äpfel", "苹果", "яблоко", "تفاح", "🍎 and more", "o'hara")


def test_classes_are_named_in_any_script(tmp_path):
    root = splits(tmp_path / "Früchte", classes=SCRIPTS, train=4, val=1, test=1)
    out = tmp_path / "données"
    run("folder", out, "--from", root, "--workers", 0)
    run("verify", out, "--workers", 2)
    assert open_split(out, "test").class_names == sorted(SCRIPTS)
    assert json.loads((out / "dataset.json").read_bytes())["classes"] == sorted(SCRIPTS)
    settings = [f"run.folder={tmp_path / 'run ü'}", f"data.path={out}", "data.workers=0", "data.batch_size=8"]
    settings += ["data.image_size=16", "train.max_steps=1", "method.gamma=1"]
    assert here("train", "configs/digits_esam.yaml", *settings).status == 0
    assert here("evaluate", tmp_path / "run ü").status == 0
    assert here("report", tmp_path / "run ü", "--out", tmp_path / "报告.html").status == 0


def test_a_class_is_one_however_its_letters_are_composed(tmp_path, caplog):
    composed, parted = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    assert composed != parted
    root = tmp_path / "in"
    splits(root, classes=(composed, "Tea"), train=2)
    splits(root, classes=(parted, "Tea"), val=2)
    run("folder", tmp_path / "out", "--from", root, "--workers", 0)
    check(tmp_path / "out", {"train": [2, 2], "validation": [2, 2]})
    assert not caplog.records
    assert open_split(tmp_path / "out", "train").class_names == [composed, "Tea"]
    (root / "val" / parted).rename(root / "train" / parted)
    assert "has two folders 'Café', whose letters are composed otherwise; put them together" in refused(
        "folder", tmp_path / "out", "--from", root
    )
