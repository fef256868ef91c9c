"""The dataset of images of which only a list was known: their headers read, small ones kept decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import BinaryIO, TypeVar

from dataloading.headers import Progress, scan
from dataloading.index import Dataset, DatasetError, DatasetIndex, Reader

Item = TypeVar("Item")


def scan_dataset(
    listed: DatasetIndex,
    read: Reader,
    chunks: Iterable[Sequence[Item]],
    open_item: Callable[[Item], BinaryIO],
    *,
    where: str,
    on_progress: Progress | None = None,
    num_threads: int | None = None,
) -> Dataset:
    """Return the dataset of the images in a list. chunks, open_item, on_progress, num_threads as `headers.scan`.

    where: the place of the images, for messages. Raises DatasetError where none of them can be read.
    """
    found = scan(chunks, listed.num_rows, open_item, on_progress=on_progress, num_threads=num_threads)
    if len(found.reasons) == listed.num_rows:
        raise DatasetError(
            f"none of the {listed.num_rows:,} images in {where} can be read; {listed.names[0]}: {found.reasons[0]}. "
            "Check the files"
        )
    scanned = replace(
        listed,
        heights_N=found.heights_N,
        widths_N=found.widths_N,
        bad_N=found.bad_N,
        reasons=found.reasons,
    )
    return Dataset(scanned, found.pixels_NHWC, read if found.pixels_NHWC is None else None)
