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


@dataclass(frozen=True)
class Header:
    """What an encoded image says that it is."""

    format: str
    height: int
    width: int


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are opened: DALI's, and two that only Pillow knows. No others: files are not trusted."""
    Image.init()
    return (*headers.FORMATS, *(name for name in ("GIF", "AVIF") if name in Image.OPEN))


def read_header(encoded: bytes) -> Header:
    """Return what the header says. Raises ValueError with a reason for people if it is unreadable or too large."""
    formats = _formats()  # the first time it imports them: what fails then is no fault of the image
    try:
        with Image.open(BytesIO(encoded), formats=formats) as image:
            header = Header(image.format or "", image.height, image.width)
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(encoded):,} bytes that are no image in a known format") from error
    except Exception as error:  # a parser that meets a damaged file raises nearly anything
        raise ValueError(f"unreadable header of {len(encoded):,} bytes: {type(error).__name__}: {error}") from error
    headers.check_size(header.height, header.width)
    return header


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


def decode(encoded: bytes) -> NDArray[np.uint8]:
    """Return the pixels, uint8 (H, W, C), without EXIF rotation. Raises what Pillow raises."""
    with Image.open(BytesIO(encoded), formats=_formats()) as image:
        # Palettes with transparency go by way of RGBA, as Pillow asks for in a warning.
        return headers.decode(image.convert("RGBA") if image.mode == "P" else image)


def decode_part(encoded: bytes, anchor: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the window (top, left), (height, width), uint8 (height, width, C). Raises what Pillow raises."""
    (top, left), (height, width) = anchor, size
    pixels_HWC = decode(encoded)[top : top + height, left : left + width]
    if pixels_HWC.shape != (height, width, 3):
        raise ValueError(f"the window ({top}, {left}), ({height}, {width}) is not inside the image")
    return torch.from_numpy(pixels_HWC.copy())
