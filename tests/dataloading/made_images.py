"""Images and datasets that the data loading tests make for themselves."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dataloading.index import Dataset, DatasetIndex


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Return a smooth random picture, which JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_sized_jpegs(num: int) -> list[bytes]:
    return [encode(picture(60 + 7 * i % 90, 50 + 11 * i % 120, i), quality=90) for i in range(num)]


def encoded_dataset(files: list[bytes], damage: dict[int, bytes] | None = None, bad: tuple[int, ...] = ()) -> Dataset:
    """Return a dataset of encoded images, of which some are other bytes now than when they were indexed."""
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    bad_N = np.zeros(len(files), dtype=bool)
    bad_N[list(bad)] = True
    index = DatasetIndex(
        source="made",
        names=[f"{row}.jpg" for row in range(len(files))],
        heights_N=np.array([height for _, height in sizes], dtype=np.int32),
        widths_N=np.array([width for width, _ in sizes], dtype=np.int32),
        labels_N=None,
        class_names=(),
        bad_N=bad_N,
        digest="made",
        reasons=dict.fromkeys(bad, "unreadable"),
    )
    stored = dict(enumerate(files)) | (damage or {})
    return Dataset(index, None, stored.__getitem__)


def pixel_dataset(num: int, height: int, width: int) -> Dataset:
    pixels_NHWC = np.random.default_rng(num).integers(0, 256, (num, height, width, 3), dtype=np.uint8)
    index = DatasetIndex(
        source="made",
        names=[str(row) for row in range(num)],
        heights_N=np.full(num, height, dtype=np.int32),
        widths_N=np.full(num, width, dtype=np.int32),
        labels_N=None,
        class_names=(),
        bad_N=np.zeros(num, dtype=bool),
        digest="made",
    )
    return Dataset(index, pixels_NHWC, None)
