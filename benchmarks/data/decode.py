"""Which library turns a JPEG into a random resized crop of 224 pixels fastest, on one core.

    python -m benchmarks.data.decode [--images 200] [--rounds 5] [--out FILE]

Speeds are images per second of CPU time. PyTurboJPEG and SPDL take part where they are installed (SPDL needs FFmpeg's
libraries); nothing of the product depends on them.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional

from benchmarks.data.photographs import jpeg, photograph
from esam_dist.data.augment import random_box
from esam_dist.data.decode import Box, ImageFile
from esam_dist.data.prepare.encode import JPEGTRAN, Encoding

RESULTS = Path(__file__).parent / "results"
SIZE = 224
Decoder = Callable[[bytes, Box], Any]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write it to a CSV file."""
    parser = argparse.ArgumentParser(description="Which library decodes fastest.")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    originals = [jpeg(photograph(number)) for number in range(args.images)]
    sets = {"originals": originals}
    if shutil.which(JPEGTRAN):
        sets["with markers"] = [Encoding(restart_markers=True)(data, "jpg")[0] for data in originals]
    sets["256-pixel"] = [Encoding(short_side=256)(data, "jpg")[0] for data in originals]
    sets["256-pixel, no markers"] = [_without_markers(data) for data in sets["256-pixel"]]
    boxes = {name: [_box(data, number) for number, data in enumerate(files)] for name, files in sets.items()}
    speeds: dict[tuple[str, str], list[float]] = {(name, decoder): [] for decoder in DECODERS for name in sets}
    # Everything takes turns: a machine that others use changes its speed in between.
    for _ in range(args.rounds):
        for (name, decoder), values in speeds.items():
            start = time.process_time()
            for data, box in zip(sets[name], boxes[name], strict=True):
                DECODERS[decoder](data, box)
            values.append(args.images / (time.process_time() - start))
    rows = []
    for name, decoder in itertools.product(sets, DECODERS):
        values = speeds[name, decoder]
        row = {"images": name, "decoder": decoder, "median": round(statistics.median(values))}
        rows.append(row | {"min": round(min(values)), "max": round(max(values))})
        print("{images:22} {decoder:44} {median:6} ({min}-{max})".format(**rows[-1]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _without_markers(data: bytes) -> bytes:
    """The same picture, encoded again; a little of it is lost, no time."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def _box(data: bytes, seed: int) -> Box:
    image = ImageFile(data)
    return random_box(image.width, image.height, Random(seed))


def _edges(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.left + box.width, box.top + box.height


def _ours(data: bytes, box: Box, antialias: bool = True) -> Any:
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    ImageFile(data).crop(box, out, antialias=antialias)
    return out


def _ours_fast(data: bytes, box: Box) -> Any:
    return _ours(data, box, False)


def _pillow(data: bytes, box: Box) -> Any:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=_edges(box)))


def _pillow_draft(data: bytes, box: Box) -> Any:
    image = Image.open(io.BytesIO(data))
    width = image.width
    shrink = min(box.width, box.height) / SIZE
    image.draft("RGB", (int(image.width / shrink), int(image.height / shrink)))
    scale = image.width / width
    edges = tuple(edge * scale for edge in _edges(box))
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, edges, reducing_gap=2.0))


def _torchvision(data: bytes, box: Box) -> Any:
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return functional.resized_crop(image, box.top, box.left, box.height, box.width, [SIZE, SIZE], antialias=True)


def _simplejpeg_scaled(data: bytes, box: Box) -> Any:
    """DCT scaling in eighths, as far as the crop shrinks."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    shrink = max(1.0, min(box.width, box.height) / SIZE)
    pixels = simplejpeg.decode_jpeg(
        data, "RGB", True, True, min_height=int(np.ceil(height / shrink)), min_width=int(np.ceil(width / shrink))
    )
    left, top, right, bottom = (round(edge * pixels.shape[1] / width) for edge in _edges(box))
    return cv2.resize(pixels[top:bottom, left:right], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


def _simplejpeg_alone(data: bytes, _: Box) -> Any:
    """No crop, no resize: what any way that decodes whole files with libjpeg-turbo takes at least."""
    return simplejpeg.decode_jpeg(data, "RGB", True, True)


def _simplejpeg_area(data: bytes, box: Box) -> Any:
    left, top, right, bottom = _edges(box)
    pixels = simplejpeg.decode_jpeg(data, "RGB", True, True)[top:bottom, left:right]
    return cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _opencv(data: bytes, box: Box) -> Any:
    left, top, right, bottom = _edges(box)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)[top:bottom, left:right]
    return cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


DECODERS: dict[str, Decoder] = {
    "Pillow, box resize": _pillow,
    "Pillow, draft and reduced box resize": _pillow_draft,
    "torchvision, v2 resized_crop": _torchvision,
    "OpenCV, linear": _opencv,
    "simplejpeg scaled in eighths, OpenCV linear": _simplejpeg_scaled,
    "simplejpeg, OpenCV area": _simplejpeg_area,
    "simplejpeg alone, all pixels, no resize": _simplejpeg_alone,
    "esam_dist (simplejpeg; antialias)": _ours,
    "esam_dist (simplejpeg, OpenCV; no antialias)": _ours_fast,
}


def _add_pyturbojpeg() -> None:
    from turbojpeg import TJFLAG_FASTDCT, TJFLAG_FASTUPSAMPLE, TJPF_RGB, TurboJPEG

    turbo = TurboJPEG()

    def decode(data: bytes, box: Box) -> Any:
        left, top, right, bottom = _edges(box)
        pixels = turbo.decode(data, TJPF_RGB, flags=TJFLAG_FASTDCT | TJFLAG_FASTUPSAMPLE)
        return cv2.resize(pixels[top:bottom, left:right], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)

    DECODERS["PyTurboJPEG, OpenCV linear"] = decode


def _add_spdl() -> None:
    import spdl.io

    def decode(data: bytes, box: Box) -> Any:
        crop = f"crop={box.width}:{box.height}:{box.left}:{box.top},scale={SIZE}:{SIZE},format=rgb24"
        frames = spdl.io.decode_packets(spdl.io.demux_image(data), filter_desc=crop)
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    decode(jpeg(photograph(0)), Box(0, 0, 300, 300))
    DECODERS["SPDL (FFmpeg), crop and scale"] = decode


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for add in (_add_pyturbojpeg, _add_spdl):
        try:
            add()
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{add.__name__}: not here ({str(error)[:60]})")
    main()
