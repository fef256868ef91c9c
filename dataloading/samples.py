"""Samples of more than 8 bits: the range that the format states becomes 0 to 255, or the image is refused.

    PNG, JPEG 2000, PGM, PPM   scaled by Pillow to all of 16 or 8 bits; of 16 the upper 8 are kept
    TIFF of 9 to 16 bits       the upper 8 of the bits that it states, inverted where 0 is white
    TIFF of 32 bits, or signed no range: what is black and white is not known

Shapes: H x W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_UNSIGNED, _UNDEFINED = 1, 4
_WHITE_IS_ZERO = 0


class NoRange(ValueError):
    """Samples that cannot be scaled to 8 bits, because nobody knows which of them are black and white."""


def check_samples(image: Image.Image) -> None:
    """Raise NoRange for an opened image whose samples have no range."""
    is_short = image.format == "PPM" or max(_tiff_tag(image, _BITS, (32,))) <= 16
    if image.mode == "F":
        what = "floating-point values"
    elif image.mode == "I" and not is_short:
        what = "32-bit values"
    elif not _is_unsigned(image):
        what = "signed values"
    else:
        return
    where = image.format or "picture in memory"
    raise NoRange(f"{what} in a {where}: it states no range that they could be scaled by to 8 bits; convert the image")


def depends_on_rules(image: Image.Image) -> bool:
    """Whether "scaled" and "clipped" give other pixels for an opened image, or only one of them any."""
    if image.mode.startswith("I;16"):
        return _too_long(image) != 8 or _is_inverted(image)
    return image.mode in ("I", "F") or not _is_unsigned(image)


def is_deep(image: Image.Image) -> bool:
    """Whether the samples of an opened image are more than 8 bits in Pillow's memory."""
    return image.mode == "I" or image.mode.startswith("I;16")


def scaled(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of a gray image that `is_deep`, uint8 (H, W)."""
    grey_HW = (np.asarray(image) >> _too_long(image)).astype(np.uint8)
    return 255 - grey_HW if _is_inverted(image) else grey_HW


def _too_long(image: Image.Image) -> int:
    """Return how many bits the samples of a deep image have beyond 8."""
    return max(_tiff_tag(image, _BITS, (16,))) - 8


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white; Pillow inverts samples of 8 bits itself."""
    return _tiff_tag(image, _PHOTOMETRIC, (1,))[0] == _WHITE_IS_ZERO


def _is_unsigned(image: Image.Image) -> bool:
    return set(_tiff_tag(image, _SAMPLE_FORMAT, (_UNSIGNED,))) <= {_UNSIGNED, _UNDEFINED}


def _tiff_tag(image: Image.Image, tag: int, absent: tuple[int, ...]) -> tuple[int, ...]:
    """Return the values of a tag of a TIFF file, `absent` where there are none."""
    values = getattr(image, "tag_v2", {}).get(tag, absent) if image.format == "TIFF" else absent
    return values if isinstance(values, tuple) else (values,)
