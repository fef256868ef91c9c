"""How the samples in a file become 8-bit pixels the right way up: rules that every decoder follows.

A run, an index and a packed data set state theirs by value. What states none was written by a version before the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataloading.choices import DEEP_SAMPLES, ORIENTATIONS


@dataclass(frozen=True)
class PixelRules:
    """What decides the pixels of an image beside its bytes."""

    orientation: str = "exif"
    """One of `ORIENTATIONS`. "exif": images are turned as their EXIF data say, in all formats; sizes and windows are
    those of the turned image. "tiff": TIFF files only."""
    deep_samples: str = "scaled"
    """One of `DEEP_SAMPLES`, for samples of more than 8 bits. "scaled": the range that the format states becomes 0 to
    255; images without such a range (32-bit and signed values) are damaged. "clipped": some formats are clipped at 255
    instead, and so nearly white."""

    def __post_init__(self) -> None:
        for name, found, expected in (
            ("orientation", self.orientation, ORIENTATIONS),
            ("deep_samples", self.deep_samples, DEEP_SAMPLES),
        ):
            if found not in expected:
                raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(expected)}")

    @classmethod
    def stated(cls, values: Mapping[str, Any] | None) -> PixelRules:
        """Return the rules that were stored by value; None was stored by a version before them."""
        if values is None:
            return BEFORE_RULES
        return cls(orientation=values["orientation"], deep_samples=values["deep_samples"])


BEFORE_RULES = PixelRules("tiff", "clipped")
"""What versions without rules did."""
