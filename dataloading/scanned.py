"""The dataset of images of which only a list was known: their headers read, small ones kept decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import BinaryIO, TypeVar

from dataloading.headers import Progress, all_small, scan
from dataloading.index import Dataset, DatasetError, DatasetIndex, Reader
from dataloading.pixel_rules import PixelRules

Item = TypeVar("Item")


def holds(index: DatasetIndex | None, rules: PixelRules | None) -> bool:
    """Whether a saved index tells all that headers would tell again, so that nothing has to be looked at.

    Small images are kept decoded, so they are read all the same.
    """
    if index is None or (rules is not None and rules != index.rules):
        return False
    return not all_small(index.heights_N, index.widths_N, index.bad_N)


def scan_dataset(
    listed: DatasetIndex,
    read: Reader,
    chunks: Iterable[Sequence[Item]],
    open_item: Callable[[Item], BinaryIO],
    *,
    where: str,
    on_progress: Progress | None = None,
    num_threads: int | None = None,
    rules: PixelRules | None = None,
) -> Dataset:
    """Return the dataset of the images in a list. chunks, open_item, on_progress, num_threads, rules as `headers.scan`.

    where: the place of the images, for messages. Raises DatasetError where none of them can be read.
    """
    rules = rules or PixelRules()
    found = scan(chunks, listed.num_rows, open_item, on_progress=on_progress, num_threads=num_threads, rules=rules)
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
        rules=rules,
    )
    return Dataset(scanned, found.pixels_NHWC, read if found.pixels_NHWC is None else None)
