"""Encoded images of a data set that holds its pixels in memory."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, eq=False)
class PixelsReader:
    """Calling it with a row returns the row's pixels as a PNG, which loses nothing."""

    pixels_NHWC: NDArray[np.uint8]
    is_remote = False

    def __call__(self, row: int) -> bytes:
        file = BytesIO()
        Image.fromarray(self.pixels_NHWC[row]).save(file, "PNG")
        return file.getvalue()

    def subset(self, rows_R: NDArray[np.int64]) -> PixelsReader:
        """Return the reader of some rows, numbered from 0."""
        return PixelsReader(self.pixels_NHWC[rows_R])
