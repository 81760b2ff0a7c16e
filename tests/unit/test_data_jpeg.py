"""A JPEG with restart markers is cut to a crop before it is decoded, and shows the same pixels."""

import io
import random
import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from esam_dist.data.augment import centre_box
from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import Box, ImageFile
from esam_dist.data.jpeg import Edges, Part, cut, read_header
from esam_dist.data.prepare.encode import Encoding
from tests.unit.test_data_decode import encode, exif, with_segments

SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    """Smooth in parts, rough in others, so that intervals differ in length."""
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, channels)) * np.linspace(0, 1, width)[None, :, None]
    return Image.fromarray(pixels.astype(np.uint8)[..., 0] if channels == 1 else pixels.astype(np.uint8))


def part_of(data: bytes, left: int, top: int, right: int, bottom: int) -> Part:
    header = read_header(data)
    assert header is not None
    return cut(data, header, Edges(left, top, right, bottom))


def pixels_of(data: bytes, down: int = 1) -> np.ndarray:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(
        data, "RGB", fastdct=True, fastupsample=True, min_height=-(-height // down), min_width=-(-width // down)
    )


def untouched(data: bytes, right: int = 20, bottom: int = 20) -> bool:
    return part_of(data, 0, 0, right, bottom) == Part(data, 0, 0)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([*SUBSAMPLINGS, "grey"]),
    st.sampled_from([1, 2, 3, "row", "two rows"]),
    st.sampled_from([1, 2, 4, 8]),
    st.data(),
)
def test_a_part_shows_the_pixels_of_the_whole(width, height, kind, interval, down, data):
    across = -(-width // (8 if kind in ("4:4:4", "grey") else 16))
    blocks = {"row": across, "two rows": 2 * across}.get(interval, interval)
    options = {"subsampling": kind} if kind != "grey" else {}
    whole = io.BytesIO()
    noise(width, height, 1 if kind == "grey" else 3).save(whole, "JPEG", restart_marker_blocks=blocks, **options)
    rows, columns = -(-height // down), -(-width // down)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    # In tiny pictures the decoder takes another scale that rounds to the same size.
    assume(down == 1 or min(height, width) >= 8 * down)
    expected = pixels_of(whole.getvalue(), down)
    assert expected.shape == (rows, columns, 3)
    part = part_of(whole.getvalue(), left * down, top * down, right * down, bottom * down)
    assert (part.top % 8, part.left % 8) == (0, 0)
    y, x = part.top // down, part.left // down
    shown = pixels_of(part.data, down)[top - y : bottom - y, left - x : right - x]
    assert np.array_equal(shown, expected[top:bottom, left:right])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_what_a_crop_does_not_touch_is_left_out(subsampling, blocks):
    file = io.BytesIO()
    noise(320, 256).save(file, "JPEG", quality=95, subsampling=subsampling, restart_marker_blocks=blocks)
    data = file.getvalue()
    part = part_of(data, 100, 70, 200, 130)
    height, width, *_ = simplejpeg.decode_jpeg_header(part.data)
    assert (part.left, part.top) <= (100, 70)
    assert part.left + width >= 200
    assert part.top + height >= 130
    assert height <= 60 + 2 * 16
    assert width <= 100 + 2 * 16 * blocks
    assert len(part.data) < 0.35 * len(data)


@pytest.mark.parametrize("size", [16, 64, 224])
@pytest.mark.parametrize("antialias", [False, True])
def test_crops_with_and_without_markers_are_equal_to_the_bit(size, antialias):
    picture = noise(341, 257)
    plain, marked = encode(picture), encode(picture, restart_marker_blocks=1)
    boxes = [
        Box(0, 0, 341, 257),
        Box(13, 30, 200, 150),
        Box(340, 256, 1, 1),
        Box(100, 0, 241, 257),
        centre_box(341, 257),
    ]
    for box in boxes:
        crops = np.zeros((2, size, size, 3), np.uint8)
        ImageFile(plain).crop(box, crops[0], antialias=antialias)
        ImageFile(marked).crop(box, crops[1], antialias=antialias)
        assert np.array_equal(*crops)


def test_prepared_images_are_cut():
    data, suffix = Encoding(short_side=128)(encode(noise(400, 300)), "jpg")
    assert suffix == "jpg"
    assert len(part_of(data, 30, 20, 80, 60).data) < len(data) / 3


@pytest.mark.parametrize("quality", [90, 93, 95])
def test_images_that_hardly_compress_are_prepared_too(quality):
    rough = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (600, 800, 3))
    data, _ = Encoding(short_side=599, quality=quality)(encode(Image.fromarray(rough), "PNG"), "png")
    assert Image.open(io.BytesIO(data)).size == (799, 599)
    assert part_of(data, 0, 0, 100, 100) != Part(data, 0, 0)


def test_a_part_has_its_markers_in_turn_and_ends():
    # 20 columns of MCUs: rows begin anywhere in the turn of eight.
    data = encode(noise(160, 160), restart_marker_blocks=1)
    part = bytes(part_of(data, 25, 25, 120, 60).data)
    header = read_header(part)
    coded = part[header.scan :].replace(b"\xff\0", b"")
    markers = [coded[place + 1] for place, byte in enumerate(coded[:-1]) if byte == 0xFF]
    assert markers == [0xD0 + number % 8 for number in range(len(markers) - 1)] + [0xD9]
    # Pillow reads it without a complaint too.
    Image.open(io.BytesIO(part)).load()


def test_a_grey_file_that_claims_subsampling_has_none():
    data = encode(noise(160, 96, channels=1), restart_marker_blocks=1)
    place = read_header(data).frame + 6
    assert data[place] == 0x11
    data = data[:place] + b"\x22" + data[place + 1 :]
    part = part_of(data, 50, 40, 70, 60)
    assert (part.left, part.top) == (48, 40)
    assert np.array_equal(pixels_of(part.data), pixels_of(data)[40:64, 48:72])


def test_crops_of_nearly_all_are_decoded_whole():
    data = encode(noise(160, 160), restart_marker_blocks=1)
    assert untouched(data, 160, 152)
    assert not untouched(data, 160, 120)


MARKED = encode(noise(160, 96), restart_marker_blocks=1)


def marker(number: int) -> int:
    """Where the marker behind interval `number` of MARKED is."""
    scan = read_header(MARKED).scan
    place = scan
    for _ in range(number + 1):
        place = next(at for at in range(place, len(MARKED)) if MARKED[at] == 0xFF and MARKED[at + 1]) + 2
    return place - 2


@pytest.mark.parametrize(
    "data",
    [
        encode(noise(160, 96)),
        encode(noise(160, 96), restart_marker_blocks=1, progressive=True),
        # 20 MCUs in a row.
        encode(noise(160, 96), restart_marker_blocks=3),
        encode(noise(160, 96), restart_marker_blocks=40),
        encode(noise(160, 96).convert("CMYK"), restart_marker_blocks=7),
    ],
    ids=["no markers", "progressive", "across rows", "two rows", "cmyk across rows"],
)
def test_files_that_cannot_be_told_apart_are_decoded_whole(data):
    assert untouched(data)
    ImageFile(data).crop(Box(8, 8, 20, 20), np.empty((8, 8, 3), np.uint8))


def test_markers_that_are_missing_or_out_of_turn_are_not_relied_on():
    for number in (0, 7, 100):
        place = marker(number)
        assert untouched(MARKED[:place] + MARKED[place + 2 :])
        assert untouched(MARKED[: place + 1] + bytes([0xD0 + (number + 3) % 8]) + MARKED[place + 2 :])
    assert not untouched(MARKED)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_short_is_refused_whatever_is_cropped(share):
    data = MARKED[: int(share * len(MARKED))]
    assert read_header(data) is None or untouched(data)
    with pytest.raises(SampleError, match=r"undecodable|truncated"):
        ImageFile(data).crop(Box(0, 0, 8, 8), np.empty((8, 8, 3), np.uint8))


def test_what_follows_the_end_of_an_image_is_no_part_of_it():
    part = part_of(MARKED + b"\xff\xd0 something else \xff\xd9", 0, 0, 20, 20)
    assert part.data == part_of(MARKED, 0, 0, 20, 20).data


@pytest.mark.parametrize("end", range(0, 700, 7))
def test_no_header_is_too_short_to_be_looked_at(end):
    header = read_header(MARKED[:end])
    assert header is None or cut(MARKED[:end], header, Edges(0, 0, 8, 8)).data == MARKED[:end]


def test_whatever_is_changed_in_a_file_with_markers_it_is_read_or_counted():
    rng, scan = random.Random(0), read_header(MARKED).scan
    refused = 0
    for _ in range(1500):
        data = bytearray(MARKED)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(rng.choice([scan, len(data)]))] = rng.choice([0, 1, 255, rng.randrange(256)])
        try:
            # Any other error ends the test.
            ImageFile(bytes(data)).crop(Box(8, 8, 20, 20), np.empty((8, 8, 3), np.uint8))
        except SampleError:
            refused += 1
    assert 300 < refused < 1200


def test_a_file_that_may_be_turned_has_no_header():
    assert read_header(with_segments(MARKED, exif(3, 1, struct.pack(">HH", 6, 0)))) is None
