"""Images through Pillow: the check of a header before anything is decoded, and the decoder that every format has.

Shapes: H x W pixels of the image, C = 3 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dataloading import chunks, headers, jpeg
from dataloading.orientation import TAIL_BYTES, orientation_of, turned
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import raise_if_of_memory, too_large_for_memory


@dataclass(frozen=True)
class Header:
    """What an encoded image says that it is."""

    format: str
    height: int
    """Of the image the right way up, as `width` is, where the rules have it turned."""
    width: int
    orientation: int = 1
    """How stored pixels are to be turned (EXIF's numbers); 1 where they are not."""
    is_plain: bool = False
    """Fast decoders may see it: `is_plain`."""


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are opened: DALI's, and two that only Pillow knows. No others: files are not trusted."""
    Image.init()
    return (*headers.FORMATS, *(name for name in ("GIF", "AVIF") if name in Image.OPEN))


def read_header(encoded: bytes, rules: PixelRules | None = None) -> Header:
    """Return what the header says, by the rules (None: the present ones).

    Raises ValueError with a reason for people if it is unreadable, or says what cannot be decoded.
    """
    rules = rules or PixelRules()
    formats = _formats()  # the first time it imports them: what fails then is no fault of the image
    try:
        with Image.open(BytesIO(encoded), formats=formats) as image:
            tail = encoded[-TAIL_BYTES:] if image.format == "PNG" else b""
            orientation = orientation_of(image, tail) if rules.orientation == "exif" else 1
            height, width = headers.checked_size(image, rules, tail)
            shown = is_plain(encoded, image.format or "")
            if image.format in jpeg.FORMATS and not shown:
                jpeg.check_scans(encoded, height, width)
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(encoded):,} bytes that are no image in a known format") from error
    except headers.REFUSALS:
        raise
    except Exception as error:  # a parser that meets a damaged file raises nearly anything
        raise_if_of_memory(error, f"the header of an image of {len(encoded):,} bytes")
        raise ValueError(f"unreadable header of {len(encoded):,} bytes: {type(error).__name__}: {error}") from error
    return Header(image.format or "", height, width, orientation, shown)


def is_plain(encoded: bytes, image_format: str) -> bool:
    """Return whether fast decoders may see an image: of a format whose broken files are harmless to them, whole, and
    no animation.

    Hostile TIFF, JPEG 2000, BMP and PPM files end a process in nvImageCodec 0.9; whole JPEG, PNG and WebP files never
    did, damaged ones included. Images that are damaged in a way that can be seen from outside are Pillow's, because it
    looks at the whole image and says what is wrong.
    """
    if image_format == "JPEG":
        return jpeg.is_sound(encoded)
    if image_format == "PNG":
        return chunks.is_sound_png(encoded)
    if image_format == "WEBP":
        return chunks.is_sound_webp(encoded)
    return False


def decode(encoded: bytes, rules: PixelRules | None = None) -> NDArray[np.uint8]:
    """Return the pixels, uint8 (H, W, C), the right way up by the rules (None: the present ones).

    Raises what Pillow raises, and ValueError for what `read_header` refuses.
    """
    rules = rules or PixelRules()
    pixels_HWC, orientation = _decode_stored(encoded, rules)
    return turned(pixels_HWC, orientation) if rules.orientation == "exif" else pixels_HWC


def decode_part(
    encoded: bytes,
    anchor: tuple[int, int],
    size: tuple[int, int],
    orientation: int = 1,
    rules: PixelRules | None = None,
) -> Tensor:
    """Return a window of the stored image, turned, uint8 (height, width, C). Raises what `decode` raises.

    anchor, size: top and left, height and width, before the window is turned as `orientation` says.
    """
    (top, left), (height, width) = anchor, size
    stored_HWC, _ = _decode_stored(encoded, rules or PixelRules())
    pixels_HWC = stored_HWC[top : top + height, left : left + width]
    if pixels_HWC.shape != (height, width, 3):
        raise ValueError(f"the window ({top}, {left}), ({height}, {width}) is not inside the image")
    return torch.from_numpy(turned(pixels_HWC, orientation).copy())


def _decode_stored(encoded: bytes, rules: PixelRules) -> tuple[NDArray[np.uint8], int]:
    """Return the pixels as the file has them, uint8 (H, W, C), and its orientation."""
    with Image.open(BytesIO(encoded), formats=_formats()) as image:
        if image.format in jpeg.FORMATS:
            jpeg.check_scans(encoded, image.height, image.width)
        try:
            return headers.decode_stored(image, rules), orientation_of(image)
        except MemoryError as error:
            raise headers.BadHeader(too_large_for_memory(image.height, image.width)) from error
