"""The structure of JPEG files, without decoding them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_IN_SCAN = np.zeros(256, dtype=np.bool_)
_IN_SCAN[[0x00, *range(0xD0, 0xD8), 0xFF]] = True
"""What may follow 0xff within a scan: a stuffed 0, a restart marker, padding."""
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_BASELINE, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BETWEEN_SCANS = frozenset({0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Huffman tables, restart intervals, comments and application data."""
FORMATS = ("JPEG", "MPO")
"""Pillow's names of JPEG files of one picture and of several."""
MAX_SCAN_PIXELS = 1_500_000_000
"""Most pixels of all scans of a file together, which take a second or two; a progressive image has some ten scans."""
_LEAST_PIXELS = 4096
"""A scan costs as much as this many pixels at least."""
_MAX_SCANS = 1000


class TooManyScans(ValueError):
    """More scans than anybody writes, each of which goes over all pixels."""


def check_scans(encoded: bytes, height: int, width: int) -> None:
    """Raise TooManyScans for a JPEG file, whole or not, that would take seconds or hours to decode."""
    num_scans = encoded.count(b"\xff\xda")  # no data hold this marker; those of previews count too
    if is_too_much_work(num_scans, height, width):
        raise TooManyScans(
            f"decompression bomb: {num_scans:,} scans of {height * width:,} pixels, expected at most "
            f"{MAX_SCAN_PIXELS:,} pixels in all scans"
        )


def is_too_much_work(num_scans: int, height: int, width: int) -> bool:
    """Return whether scans are more work than those of any image that somebody wants to keep."""
    return num_scans * max(_LEAST_PIXELS, height * width) > MAX_SCAN_PIXELS


def is_sound(encoded: bytes) -> bool:
    """Return whether a JPEG file is one gray or colour frame whose scans end where they should, up to its end marker.

    A file that was damaged in mid-scan has other markers there. libjpeg goes on without a word in a part of the image
    and fails in another, so that whether it decodes depends on the window. A file of so many scans that they would take
    seconds is none either. Takes some 50 microseconds for 100 kB.
    """
    place, frame, found, height, width = 2, 0, 0, 0, 0
    if encoded[:2] != b"\xff\xd8":
        return False
    ends_E: NDArray[np.intp] | None = None
    while True:
        while encoded[place : place + 2] == b"\xff\xff":  # markers may be padded
            place += 1
        if len(encoded) < place + 2 or encoded[place] != 0xFF:
            return False
        marker = encoded[place + 1]
        if marker == _END:
            return found > 0
        length = int.from_bytes(encoded[place + 2 : place + 4])
        num_components = encoded[place + 9 : place + 10]
        place += 2 + length
        if marker == _START or length < 2 or place > len(encoded):
            return False
        if found and marker != _SCAN and marker not in _BETWEEN_SCANS:
            return False
        if marker in _FRAMES:
            if frame or (marker not in _BASELINE and marker != _PROGRESSIVE):
                return False
            if num_components not in (b"\1", b"\3"):  # how inks become colours, every decoder rounds in its own way
                return False
            frame = marker
            height, width = (int.from_bytes(encoded[place - length + at : place - length + at + 2]) for at in (3, 5))
        elif marker == _SCAN:
            # A baseline image in several scans is rare; more often that is what damage looks like.
            if not frame or (found and frame != _PROGRESSIVE):
                return False
            found += 1
            if found > _MAX_SCANS or is_too_much_work(found, height, width):
                return False
            if ends_E is None:  # once for all scans: a file may have very many
                ends_E = place + _ends_of_scans(encoded, place)
            end = int(np.searchsorted(ends_E, place))
            place = int(ends_E[end]) if end < len(ends_E) else len(encoded)


def _ends_of_scans(encoded: bytes, start: int) -> NDArray[np.intp]:
    """Return the places, counted from `start`, of markers that end a scan."""
    bytes_P = np.frombuffer(encoded, np.uint8, offset=start)
    places = np.flatnonzero(bytes_P[:-1] == 0xFF)
    return places[~_IN_SCAN[bytes_P[places + 1]]]
