"""Images of more pixels than their bytes can hold, and of values that are no colours until their range is known."""

import struct

import numpy as np
import pytest
from PIL import Image
from PIL.ImageFile import ImageFile as PillowFile

from esam_dist.data.dataset import SampleError
from tests.unit.test_data_decode import CASES, GREY, encode, png_of, reason, reference, whole


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(CASES["jpeg"][0])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [jpeg_of, png_of])
@pytest.mark.parametrize(("width", "height"), [(9_999, 9_999), (65_000, 1_000), (5_000, 4_000)])
def test_a_few_bytes_that_claim_many_pixels_are_refused_before_they_are_decoded(make, width, height, monkeypatch):
    monkeypatch.setattr(PillowFile, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    assert reason(make(width, height)) == "too_large"


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True, "optimize": True}])
def test_a_whole_jpeg_of_one_colour_is_read_however_large(options):
    """No JPEG of so many pixels can be smaller."""
    grey = encode(Image.new("L", (6_000, 3_000), 77), **options)
    assert (np.abs(whole(grey, 8) - 77) < 6).all()


def test_a_large_image_of_as_many_bytes_as_it_needs_is_read():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    data = encode(Image.fromarray(noise).resize((6_000, 3_000)))
    assert whole(data, 8).shape == (8, 8, 3)


RAMP = np.linspace(0, 1, 96)[None].repeat(64, 0)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (RAMP.astype(np.float32), "floating-point"),
        ((RAMP * 255).astype(np.float32), "floating-point"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "integers of 32 bits"),
        ((RAMP * 255).astype(np.int32), "integers of 32 bits"),
        ((RAMP * 200_000 - 100_000).astype(np.int32), "integers of 32 bits"),
    ],
)
def test_a_tiff_whose_range_nobody_knows_is_refused_and_not_black(values, told):
    with pytest.raises(SampleError, match=told) as caught:
        whole(encode(Image.fromarray(values), "TIFF"))
    assert caught.value.reason == "undecodable"


def test_a_float_ppm_is_refused():
    assert reason(b"Pf 96 64 -1.0\n" + RAMP.astype(np.float32).tobytes()) == "undecodable"


def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A little-endian TIFF of one strip."""
    tags = [(256, 96), (257, 64), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1), (278, 64)]
    data = values.astype("<u2").tobytes()
    if bits == 12:
        pairs = values.astype(np.uint16).reshape(-1, 2)
        data = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        data = data.astype(np.uint8).tobytes()
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in [*tags, (279, len(data))])
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + bytes(134 - 10 - len(entries)) + data


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_a_tiff_of_more_bits_shows_what_it_shows(bits, photometric):
    grey = RAMP if photometric else 1 - RAMP
    assert np.abs(whole(tiff(np.rint(grey * (2**bits - 1)), bits, photometric)) - reference(GREY)).mean() < 2


def test_a_16_bit_ppm_shows_what_it_shows():
    data = b"P5 96 64 65535\n" + np.rint(RAMP * 65535).astype(">u2").tobytes()
    assert np.abs(whole(data) - reference(GREY)).mean() < 2
