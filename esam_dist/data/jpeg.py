"""JPEG files read as far as their headers, and cut down to a crop before anything decodes them.

A decoder starts afresh at each restart marker (ITU T.81, E.2.4), so the intervals between markers that a
crop touches, behind a header of fewer rows and columns, are a JPEG of their own, with the same pixels. That spares the
decoding of all others, by any decoder. `prepare` writes a marker behind every MCU, the block that JPEG codes as one
(16 x 16 pixels, or 8 x 8).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORTH = 0.85
"""Share of the intervals above which to decode all is as fast as to cut (benchmarks/data/decode.py)."""

_START = b"\xff\xd8\xff"
_BASELINE, _EXTENDED, _BITS = 0xC0, 0xC1, 8
_SCAN, _RESTART_INTERVAL, _APP1 = 0xDA, 0xDD, 0xE1
_RESTARTS, _END = bytes(range(0xD0, 0xD8)), b"\xd9"


class Header(NamedTuple):
    """Where the parts of a JPEG are, as offsets from the start of the file."""

    scan: int
    """The first entropy-coded byte."""
    frame: int
    """The frame header's height, width and components; 0: not one that can be cut."""
    restart: int
    """MCUs between two restart markers; 0: there are none."""
    components: int
    """In the first scan."""


class Edges(NamedTuple):
    """A rectangle of pixels, from (left, top) to before (right, bottom)."""

    left: int
    top: int
    right: int
    bottom: int

    def times(self, factor: int) -> Edges:
        """The same rectangle of a picture so many times as large."""
        return Edges(*(edge * factor for edge in self))


class Part(NamedTuple):
    """A JPEG file of a rectangle of another's pixels."""

    data: bytes | bytearray
    left: int
    """Column of the other's where it begins, a multiple of 8."""
    top: int
    """Row of the other's where it begins, a multiple of 8."""


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG; None for what is none, or may be shown turned, by its EXIF or XMP segment."""
    place, frame, restart = 2 if data.startswith(_START) else len(data), 0, 0
    while place + 4 < len(data) and data[place] == 0xFF != data[place + 1]:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _SCAN:
            return Header(place + 2 + length, frame, restart, data[place + 4])
        if marker == _APP1:
            segment = data[place + 4 : place + 2 + length]
            if segment.startswith(b"Exif") or b"Orientation" in segment:
                return None
        if marker in (_BASELINE, _EXTENDED) and length >= 11 and data[place + 4] == _BITS:
            frame = place + 5
        if marker == _RESTART_INTERVAL:
            restart = int.from_bytes(data[place + 4 : place + 6], "big")
        place += 2 + length
    return None


def cut(data: bytes, header: Header, wanted: Edges) -> Part:
    """The part of a JPEG that holds the `wanted` pixels.

    That is all of it where cutting is not worth it, or where the intervals cannot be told apart: in a progressive file,
    without a marker at the ends of rows, with one that is missing or out of turn.
    """
    whole, at, step = Part(data, 0, 0), header.frame, header.restart
    if not (at and step) or header.components != data[at + 4]:
        return whole
    height, width = int.from_bytes(data[at : at + 2], "big"), int.from_bytes(data[at + 2 : at + 4], "big")
    mcu_width, mcu_height = _mcu(data, at)
    rows, columns = -(-height // mcu_height), -(-width // mcu_width)
    if rows * columns == 0 or columns % step:
        return whole
    across, step_width = columns // step, step * mcu_width
    first, last = wanted.left // step_width, min(-(-wanted.right // step_width), across)
    above, below = wanted.top // mcu_height, min(-(-wanted.bottom // mcu_height), rows)
    # Nothing of it is wanted where its header claims to be smaller than who asks takes it to be.
    if first >= last or above >= below or (last - first) * (below - above) > WORTH * rows * across:
        return whole
    edges = _edges(data, header.scan, rows * across)
    if edges is None:
        return whole
    starts = edges[:-1].reshape(rows, across)[above:below, first:last]
    stops = edges[1:].reshape(rows, across)[above:below, first:last]
    runs = zip(starts[:, 0].tolist(), stops[:, -1].tolist(), strict=True)
    part = bytearray().join([data[: header.scan], *[data[start:stop] for start, stop in runs]])
    y, x = above * mcu_height, first * step_width
    part[at : at + 2] = (min(below * mcu_height, height) - y).to_bytes(2, "big")
    part[at + 2 : at + 4] = (min(last * step_width, width) - x).to_bytes(2, "big")
    marks = (stops - starts).ravel().cumsum()
    np.frombuffer(part, np.uint8, offset=header.scan - 1)[marks] = np.frombuffer(_turns(len(marks)), np.uint8)
    return Part(part, x, y)


def _mcu(data: bytes, at: int) -> tuple[int, int]:
    """Width and height in pixels of what is coded as one: a scan of one component has no subsampling."""
    factors = data[at + 6 : at + 5 + 3 * data[at + 4] : 3]
    if len(factors) == 1:
        return 8, 8
    # A factor of 0 is none that a decoder lets pass.
    return 8 * max([1, *(factor >> 4 for factor in factors)]), 8 * max([1, *(factor & 15 for factor in factors)])


def _edges(data: bytes, scan: int, num_intervals: int) -> NDArray[np.int64] | None:
    """Where each interval begins, and where the last one ends, markers included: [num_intervals + 1].

    None unless just those markers are there that there must be, in turn.
    """
    coded = np.frombuffer(data, np.uint8, offset=min(scan, len(data)))
    places = (coded[:-1] == 0xFF).nonzero()[0]
    places += 1
    follow = coded[places]
    # Byte 0xFF of a picture is written as 0xFF 0x00.
    found = follow.nonzero()[0][:num_intervals]
    if follow[found].tobytes() != _turns(num_intervals):
        return None
    edges = np.empty(num_intervals + 1, np.int64)
    edges[0], edges[1:] = scan, places[found]
    edges[1:] += scan + 1
    return edges


def _turns(num_intervals: int) -> bytes:
    """Second bytes of the markers behind so many intervals: RST0 to RST7 in turn, and EOI."""
    return (_RESTARTS * (num_intervals // 8 + 1))[: num_intervals - 1] + _END
