"""Any image file becomes the right pixels, or a counted reason; never a wrong picture, never a hang."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.ImageFile import ImageFile as PillowFile

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
    assert image._turbo(box, 64).shape == (88, 100, 3)
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
    "tiff": (encode(Image.fromarray(PIXELS), "TIFF"), PIXELS),
    "ppm": (encode(Image.fromarray(PIXELS), "PPM"), PIXELS),
    "bmp": (encode(Image.fromarray(PIXELS), "BMP"), PIXELS),
    "animated gif": (
        encode(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]),
        GREY,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_of_image_shows_what_it_shows(kind):
    data, pixels = CASES[kind]
    assert np.abs(whole(data) - reference(pixels)).mean() < 4


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def turned(orientation: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(TURNED[orientation](PIXELS)))


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments behind its start marker, in front of all others."""
    return data[:2] + b"".join(segments) + data[2:]


def exif(kind: int, count: int, value: bytes) -> bytes:
    """An APP1 segment that holds an orientation of a TIFF type."""
    return segment(0xE1, b"Exif\0\0MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0112, kind, count, value, 0))


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_undone(kind, orientation):
    noted = Image.Exif()
    noted[0x0112] = orientation
    data = encode(turned(orientation), kind, exif=noted)
    image = ImageFile(data)
    assert (image.width, image.height) == (96, 64)
    assert np.abs(whole(data) - reference(PIXELS)).mean() < 4


@pytest.mark.parametrize("before", [0xE2, 0xED, 0xFE])
def test_rotation_is_found_behind_long_segments(before):
    six = exif(3, 1, b"\0\6\0\0")
    data = with_segments(encode(turned(6)), segment(before, bytes(2000)), segment(before, bytes(60_000)), six)
    assert np.abs(whole(data) - reference(PIXELS)).mean() < 3


def test_rotation_that_only_xmp_tells_is_undone_whatever_decodes():
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')
    for image in (turned(6), turned(6).convert("CMYK")):
        assert np.abs(whole(with_segments(encode(image), xmp)) - reference(PIXELS)).mean() < 4


@pytest.mark.parametrize(
    "noted",
    [
        *(exif(3, 1, struct.pack(">HH", orientation, 0)) for orientation in (0, 9, 300)),
        *(exif(kind, 1, b"\6\0\0\0") for kind in (1, 2, 7)),
    ],
)
def test_an_orientation_without_meaning_turns_nothing(noted):
    for pixels in (PIXELS, np.ascontiguousarray(PIXELS.transpose(1, 0, 2))):
        data = with_segments(encode(Image.fromarray(pixels)), noted)
        image = ImageFile(data)
        assert (image.height, image.width) == pixels.shape[:2]
        out = np.empty((8, 8, 3), np.uint8)
        image.crop(Box(image.width - 5, image.height - 5, 5, 5), out)
        assert np.abs(whole(data) - reference(pixels)).mean() < 3


@pytest.mark.parametrize("cut", range(6))
def test_a_damaged_exif_block_is_passed_over_or_counted(cut):
    head = b"MM\0*\0\0\0\10"
    damaged = segment(0xE1, b"Exif\0\0" + head[: cut + 1])
    # Pillow itself passes over the fault where it looks for a resolution that the file has not.
    assert np.abs(whole(with_segments(encode(Image.fromarray(PIXELS)), damaged)) - reference(PIXELS)).mean() < 3
    assert reason(with_segments(encode(Image.fromarray(PIXELS), dpi=(72, 72)), damaged)) == "undecodable"


@pytest.mark.parametrize("kind", ["jpeg", "cmyk jpeg", "png", "webp", "bmp", "tiff", "ppm", "animated gif"])
def test_whatever_is_changed_in_a_file_it_is_read_or_counted(kind):
    rng = random.Random(kind)
    whole_file = with_segments(CASES[kind][0], exif(3, 1, b"\0\6\0\0")) if "jpeg" in kind else CASES[kind][0]
    for _ in range(100):
        data = bytearray(whole_file)
        for _ in range(rng.randint(1, 8)):
            # Headers are short: most changes are to hit them.
            data[rng.randrange(min(len(data), rng.choice([60, 400, 10**6])))] = rng.choice(
                [0, 1, 255, rng.randrange(256)]
            )
        # Any other error ends the test.
        with contextlib.suppress(SampleError):
            assert whole(bytes(data)).shape == (32, 32, 3)


def test_formats_that_start_other_programs_are_refused():
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n") == "undecodable"


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


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (11_000, 11_000), (12_000, 14_800), (1, 2**31 - 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(width, height, monkeypatch):
    monkeypatch.setattr(PillowFile, "load", lambda _: pytest.fail("decoded"))
    assert reason(png_of(width, height)) == "too_large"


def test_a_jpeg_that_claims_enormous_dimensions_is_refused():
    data = bytearray(CASES["jpeg"][0])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(data)) == "too_large"


def test_one_pixel_is_an_image():
    assert (whole(encode(Image.new("RGB", (1, 1), (200, 100, 50)), "PNG")) == [200, 100, 50]).all()
    assert whole(encode(Image.new("RGB", (500, 1), (200, 100, 50)))).shape == (32, 32, 3)


def test_a_crop_of_a_panorama_that_is_decoded_smaller_lies_where_it_shall():
    wide = gradient(9000, 65)
    image, box = ImageFile(encode(Image.fromarray(wide))), Box(8900, 0, 64, 64)
    assert image._turbo(box, 8).shape == (9, 8, 3)
    out = np.empty((8, 8, 3), np.uint8)
    image.crop(box, out)
    expected = Image.fromarray(wide).resize((8, 8), Image.Resampling.BILINEAR, (8900, 0, 8964, 64))
    assert np.abs(out.astype(float) - np.asarray(expected, float)).mean() < 12
