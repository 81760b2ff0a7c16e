"""Image files are seen as validation sees its samples: the same pixels to the bit."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esam_dist import config
from esam_dist.data import open_validation
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError
from esam_dist.ship import describe, images
from tests.prepared import class_folders, picture, run

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path):
    """Class folders, and of each a validation image of a kind that is not plain."""
    root = tmp_path / "photos"
    class_folders(root / "train")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 50 * 40).reshape(50, 40).astype(np.uint16))
    odd = {
        "ant/grey.jpg": (noise.convert("L"), {}),
        "ant/cmyk.jpg": (noise.convert("CMYK"), {}),
        "ant/turned.jpg": (noise, {"exif": turned}),
        "bee/deep.png": (deep, {}),
        "bee/clear.png": (noise.convert("RGBA"), {}),
        "cat/palette.gif": (noise.convert("P"), {}),
        "cat/large.jpg": (picture(2, 3, (300, 200)), {}),
    }
    for name, (image, options) in odd.items():
        (root / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / "val" / name, **options)
    return root


def seen(batches):
    """The pixels of each image, in an order that does not depend on that of the images."""
    return sorted(image.numpy().tobytes() for batch in batches for image in batch.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pixels_are_those_of_validation(folders, tmp_path, workers):
    run("folder", tmp_path / "data", "--from", folders, "--workers", 0)
    keys = {"image_size": 24, "crop_ratio": 0.875, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    cfg = config.parse({"data": {"path": str(tmp_path / "data"), "batch_size": 3, "workers": workers} | keys}, "test")
    wanted = seen(open_validation(cfg.data, rank=0, world_size=1, device=CPU).batches())
    files = images.Files(images.find([folders / "val"]))
    assert len(set(wanted)) == files.num_samples == 7
    assert seen(images.batches(files, describe(cfg, 3).keys(3, workers), CPU, lambda raw: None)) == wanted


def test_images_keep_the_numbers_of_their_files_when_others_are_bad(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        picture(number % 4, 0).save(path) if number not in (0, 3) else path.write_bytes(b"x" * number)
    noted = []
    cfg = DataKeys(image_size=8, batch_size=2, workers=0)
    found = list(images.batches(images.Files(paths), cfg, CPU, noted.append))
    assert [batch.labels.tolist() for batch in found] == [[1], [2], [4, 5]]
    assert [(Path(skip.name).name, skip.reason) for raw in noted for skip in raw.skips] == [
        ("0.png", "empty"),
        ("3.png", "undecodable"),
    ]


def test_folders_are_searched_in_order_without_what_programs_leave(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a/x.webp", ".git/x.png", "__MACOSX/x.png", "a/._x.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b/round").symlink_to(tmp_path)
    (tmp_path / "b/3.png").symlink_to(tmp_path / "b/2.png")
    found = images.find([tmp_path, tmp_path / "a/notes.txt"])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["a/x.webp", "b/1.JPG", "b/2.png", "b/3.png", "a/notes.txt"]


def test_a_path_that_is_not_there_and_folders_without_images_are_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        images.find([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no image files.*\.jpg"):
        images.find([tmp_path])


def test_a_named_pipe_and_a_link_to_nothing_are_unreadable_and_waited_for_by_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    noted = []
    files = images.Files(images.find([tmp_path]))
    assert list(images.batches(files, DataKeys(image_size=8, workers=0), CPU, noted.append)) == []
    assert [skip.reason for raw in noted for skip in raw.skips] == ["unreadable", "unreadable"]
