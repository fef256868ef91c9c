"""Images through Pillow: the check of a header before anything is decoded, and the decoder that every format has.

Shapes: H x W pixels of the image, C = 3 channels, S side of the result.
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
from torchvision.transforms.v2 import functional as tv

from dataloading import headers

_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND"
_TAIL_BYTES = 4096


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
    try:
        with Image.open(BytesIO(encoded), formats=_formats()) as image:
            header = Header(image.format or "", image.height, image.width)
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(encoded):,} bytes that are no image in a known format") from error
    except Exception as error:  # a parser that meets a damaged file raises nearly anything
        raise ValueError(f"unreadable header of {len(encoded):,} bytes: {type(error).__name__}: {error}") from error
    headers.check_size(header.height, header.width)
    return header


def is_plain(encoded: bytes, image_format: str) -> bool:
    """Return whether the fast decoder may see an image: of a format that it gets, whole, and no animation.

    DALI 2.4 fails as a whole batch where one image fails, and now and then its threads still work on that batch when
    its memory is gone: the process ends with a segmentation fault (seen on 2026-11-24). So it gets nothing that is cut
    off. An image that is whole and fails in DALI alone (5 of 698 hostile files) can still do that.
    """
    if image_format == "JPEG":
        return _JPEG_END in encoded[-_TAIL_BYTES:]
    if image_format == "PNG":
        return _PNG_END in encoded[-_TAIL_BYTES:] and b"acTL" not in encoded[:_TAIL_BYTES]
    if image_format == "WEBP":
        return len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little") and b"ANIM" not in encoded[:64]
    return False


def decode(encoded: bytes) -> NDArray[np.uint8]:
    """Return the pixels, uint8 (H, W, C), without EXIF rotation. Raises what Pillow raises."""
    with Image.open(BytesIO(encoded), formats=_formats()) as image:
        # Palettes with transparency go by way of RGBA, as Pillow asks for in a warning.
        return headers.decode(image.convert("RGBA") if image.mode == "P" else image)


def decode_crop(encoded: bytes, anchor: NDArray[np.int64], window: NDArray[np.int64], size: int) -> Tensor:
    """Return the window (top, left), (height, width) resized as torchvision does: uint8 (C, S, S)."""
    pixels_CHW = torch.from_numpy(decode(encoded).transpose(2, 0, 1).copy())
    (top, left), (height, width) = anchor.tolist(), window.tolist()
    return tv.resized_crop(pixels_CHW, top, left, height, width, [size, size], antialias=True)
