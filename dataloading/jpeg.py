"""The structure of JPEG files, without decoding them."""

from __future__ import annotations

import numpy as np

_IN_SCAN = np.zeros(256, dtype=np.bool_)
_IN_SCAN[[0x00, *range(0xD0, 0xD8), 0xFF]] = True
"""What may follow 0xff within a scan: a stuffed 0, a restart marker, padding."""
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_BASELINE, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BETWEEN_SCANS = frozenset({0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Huffman tables, restart intervals, comments and application data."""


def is_sound(encoded: bytes) -> bool:
    """Return whether a JPEG file is one gray or colour frame whose scans end where they should, up to its end marker.

    A file that was damaged in mid-scan has other markers there. libjpeg goes on without a word in a part of the image
    and fails in another, so that whether it decodes depends on the window. Takes some 50 microseconds for 100 kB.
    """
    place, frame, num_scans = 2, 0, 0
    if encoded[:2] != b"\xff\xd8":
        return False
    while True:
        while encoded[place : place + 2] == b"\xff\xff":  # markers may be padded
            place += 1
        if len(encoded) < place + 2 or encoded[place] != 0xFF:
            return False
        marker = encoded[place + 1]
        if marker == _END:
            return num_scans > 0
        length = int.from_bytes(encoded[place + 2 : place + 4])
        num_components = encoded[place + 9 : place + 10]
        place += 2 + length
        if marker == _START or length < 2 or place > len(encoded):
            return False
        if num_scans and marker != _SCAN and marker not in _BETWEEN_SCANS:
            return False
        if marker in _FRAMES:
            if frame or (marker not in _BASELINE and marker != _PROGRESSIVE):
                return False
            if num_components not in (b"\1", b"\3"):  # how inks become colours, every decoder rounds in its own way
                return False
            frame = marker
        elif marker == _SCAN:
            # A baseline image in several scans is rare; more often that is what damage looks like.
            if not frame or (num_scans and frame != _PROGRESSIVE):
                return False
            num_scans += 1
            place = _end_of_scan(encoded, place)


def _end_of_scan(encoded: bytes, start: int) -> int:
    """Return the place of the marker that ends a scan, or the length of the file."""
    bytes_P = np.frombuffer(encoded, np.uint8, offset=start)
    places = np.flatnonzero(bytes_P[:-1] == 0xFF)
    ends = np.flatnonzero(~_IN_SCAN[bytes_P[places + 1]])
    return start + int(places[ends[0]]) if len(ends) else len(encoded)
