"""EXIF orientation: where it stands in a file, and how pixels and windows are turned by it.

Decoders are given windows of the image as it is stored, and what they return is turned: one rule for all of them.

Shapes: H x W pixels, C = 3 channels.
"""

from __future__ import annotations

from struct import error as StructError
from struct import unpack_from

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataloading.chunks import png_exif
from dataloading.read_errors import WatchedFile

TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
"""By orientation (EXIF 2.32, tag 274): whether rows and columns change places, and then whether the picture is flipped
up-down and left-right."""
_ORIENTATION, _SHORT = 0x112, 3
_MAX_TAGS = 4096
TAIL_BYTES = 64 << 10
"""PNG files may have EXIF data behind their pixels: looked for in so many bytes at the end."""


def orientation_of(image: Image.Image, tail: bytes = b"") -> int:
    """Return the orientation that an opened image states, 1 to 8; 1 (as stored) where it states none.

    tail: the end of the file. TIFF files are 1 always, because Pillow turns those itself.
    """
    if image.format == "TIFF":
        return 1
    exif = image.info.get("exif") or (png_exif(tail) if image.format == "PNG" else b"")
    return orientation_in(exif)


def tail_of(image: Image.Image, file: WatchedFile) -> bytes:
    """Return the end of a file if its orientation may stand there; the file's place stays as it is."""
    if image.format != "PNG" or "exif" in image.info:
        return b""
    place, size = file.tell(), file.seek(0, 2)
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    file.seek(place)
    return tail


def orientation_in(exif: bytes) -> int:
    """Return the orientation in EXIF data, 1 where they state none or cannot be read."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 1
    try:
        (start,) = unpack_from(f"{order}I", data, 4)
        (num_tags,) = unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * min(num_tags, _MAX_TAGS), 12):
            tag, kind, count, value = unpack_from(f"{order}HHIH", data, place)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and count == 1 and value in TURNS else 1
    except StructError:  # the data end before what they refer to
        return 1
    return 1


def turned_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Return height and width of the turned image."""
    return (width, height) if TURNS[orientation][0] else (height, width)


def stored_window(
    anchor: tuple[int, int], size: tuple[int, int], whole: tuple[int, int], orientation: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return top and left, height and width of a window in the image as it is stored.

    anchor, size, whole: top and left of the window, its height and width, and those of the whole turned image.
    """
    (top, left), (height, width) = anchor, size
    transposed, up_down, left_right = TURNS[orientation]
    if up_down:
        top = whole[0] - top - height
    if left_right:
        left = whole[1] - left - width
    return ((left, top), (width, height)) if transposed else ((top, left), (height, width))


def turned(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return stored pixels the right way up, contiguous."""
    transposed, up_down, left_right = TURNS[orientation]
    if transposed:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    if up_down:
        pixels_HWC = pixels_HWC[::-1]
    if left_right:
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(pixels_HWC)
