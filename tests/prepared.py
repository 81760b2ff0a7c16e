"""Small sources for `esam-dist prepare`, and what they must become: the colour of an image tells its label."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esam_dist.data import prepare
from esam_dist.data.dataset import open_split
from esam_dist.data.prepare.source import digest_of
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


def flipped(data: bytes, place: int) -> bytes:
    """The same bytes with one bit changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


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


def class_folders(root: Path, size=(40, 30)) -> Path:
    """Three folders of twenty images each below `root`."""
    for label, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir(parents=True)
        for number in range(20):
            (root / name / f"{number}.JPEG").write_bytes(jpeg(picture(label, number, size)))
    return root


class Noise:
    """60 smooth random pictures of 48x40 in 4 classes."""

    name, class_names = "noise", ("a", "b", "c", "d")
    digest = digest_of(["noise"])

    def __init__(self):
        self.labels = {"train": [i % 4 for i in range(60)], "validation": [0, 1, 2, 3]}

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        small = np.random.default_rng(sample).integers(0, 256, (5, 6, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        return file.getvalue(), "jpg"
