"""Any image file becomes the right pixels, or a counted reason; never a wrong picture, never a hang."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from esam_dist.data.augment import centre_box
from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import Box, ImageFile


def gradient(width=96, height=64) -> np.ndarray:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = 90
    return pixels


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def whole(data: bytes, size: int = 32) -> np.ndarray:
    """The image's largest centred square at `size`, as floats."""
    image = ImageFile(data)
    out = np.empty((size, size, 3), np.uint8)
    image.crop(centre_box(image.width, image.height), out)
    return out.astype(float)


def reference(pixels: np.ndarray, size: int = 32) -> np.ndarray:
    """The same by Pillow."""
    height, width = pixels.shape[:2]
    left, top, side, _ = centre_box(width, height)
    image = Image.fromarray(pixels)
    return np.asarray(
        image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)), float
    )


def reason(data: bytes) -> str:
    with pytest.raises(SampleError) as caught:
        whole(data)
    return caught.value.reason


PIXELS = gradient()
GREY = PIXELS[..., :1].repeat(3, 2)


@pytest.mark.parametrize("size", [8, 32, 64, 200])
@pytest.mark.parametrize("antialias", [False, True])
def test_crop_equals_pillow(size, antialias):
    box = Box(10, 6, 60, 50)
    out = np.empty((size, size, 3), np.uint8)
    ImageFile(encode(Image.fromarray(PIXELS))).crop(box, out, antialias=antialias)
    expected = Image.fromarray(PIXELS).resize((size, size), Image.Resampling.BILINEAR, (10, 6, 70, 56))
    assert np.abs(out.astype(float) - np.asarray(expected, float)).mean() < 3


def test_a_crop_that_shrinks_a_large_image_is_decoded_smaller_and_equal():
    large = gradient(1030, 770)
    image = ImageFile(encode(Image.fromarray(large)))
    box = Box(101, 53, 800, 700)
    assert image._turbo(box, 64).shape == (97, 129, 3)
    out = np.empty((64, 64, 3), np.uint8)
    image.crop(box, out, antialias=False)
    expected = Image.fromarray(large).resize((64, 64), Image.Resampling.BILINEAR, (101, 53, 901, 753))
    assert np.abs(out.astype(float) - np.asarray(expected, float)).mean() < 3


CASES = {
    "jpeg": (encode(Image.fromarray(PIXELS)), PIXELS),
    "progressive jpeg": (encode(Image.fromarray(PIXELS), progressive=True), PIXELS),
    "png": (encode(Image.fromarray(PIXELS), "PNG"), PIXELS),
    "webp": (encode(Image.fromarray(PIXELS), "WEBP", lossless=True), PIXELS),
    "grey jpeg": (encode(Image.fromarray(PIXELS[..., 0])), GREY),
    "grey png": (encode(Image.fromarray(PIXELS[..., 0]), "PNG"), GREY),
    "palette png": (encode(Image.fromarray(GREY).convert("P", colors=256), "PNG"), GREY),
    "16-bit png": (encode(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"), GREY),
    "transparent png": (encode(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), "PNG"), PIXELS),
    "cmyk jpeg": (encode(Image.fromarray(PIXELS).convert("CMYK")), PIXELS),
    "animated gif": (
        encode(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]),
        GREY,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_of_image_shows_what_it_shows(kind):
    data, pixels = CASES[kind]
    assert np.abs(whole(data) - reference(pixels)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    data = encode(Image.fromarray(np.ascontiguousarray(turn(PIXELS))), exif=exif)
    image = ImageFile(data)
    assert (image.width, image.height) == (96, 64)
    assert np.abs(whole(data) - reference(PIXELS)).mean() < 3


def test_jpegs_with_harmless_warnings_are_read():
    data = CASES["jpeg"][0]
    # Bytes between two segments: libjpeg warns, as for some files of ImageNet, and finds the next segment.
    assert np.abs(whole(data[:-2] + b"\x00\x01\x02" + data[-2:]) - reference(PIXELS)).mean() < 4


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "progressive jpeg"])
def test_truncated_images_are_refused(kind, share):
    data = CASES[kind][0]
    assert reason(data[: int(len(data) * share)]) == "undecodable"


@pytest.mark.parametrize("data", [b"\0", b"\xff\xd8\xff", b"not an image", b"\xff\xd8\xff\xe0" + b"\0" * 500])
def test_garbage_is_refused(data):
    assert reason(data) == "undecodable"


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim to be a large picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (11_000, 11_000), (1, 2**31 - 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(width, height):
    assert reason(png_of(width, height)) in ("too_large", "undecodable")


def test_a_jpeg_that_claims_enormous_dimensions_is_refused():
    data = bytearray(CASES["jpeg"][0])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(data)) == "too_large"


def test_one_pixel_is_an_image():
    assert (whole(encode(Image.new("RGB", (1, 1), (200, 100, 50)), "PNG")) == [200, 100, 50]).all()
    assert whole(encode(Image.new("RGB", (500, 1), (200, 100, 50)))).shape == (32, 32, 3)
