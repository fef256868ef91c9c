"""Which images of one data set are rows of another, as where a run is tested on what it is trained on.

Shapes: N rows of the first data set, Q rows of the second.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from dataloading.index import Dataset, Names
from dataloading.shard_reader import ShardReader

_NAMES_AT_ONCE = 1 << 20


def rows_of_the_same_images(dataset: Dataset, other: Dataset) -> NDArray[np.int64]:
    """Return for each row of `other` the row of `dataset` that is the same image, -1 where there is none, int64 (Q,).

    Of one source, an image is known by its name. Of two splits, images of one name and size are the same where their
    bytes are: their checksums, or their pixels where they are in memory, or what is read of images on this machine.
    """
    rows_Q = _rows_of_names(Names.of(dataset.index.names), Names.of(other.index.names))
    if dataset.index.source == other.index.source:
        return rows_Q
    for row in np.flatnonzero(rows_Q >= 0).tolist():
        if not _are_the_same(dataset, int(rows_Q[row]), other, row):
            rows_Q[row] = -1
    return rows_Q


def _rows_of_names(names_N: Names, names_Q: Names) -> NDArray[np.int64]:
    rows_Q = np.full(len(names_Q), -1, dtype=np.int64)
    for start in range(0, len(names_N), _NAMES_AT_ONCE):
        part = names_N.array[start : start + _NAMES_AT_ONCE]
        found = pc.index_in(part, value_set=names_Q.array)  # pyright: ignore[reportAttributeAccessIssue] - made there
        places = np.flatnonzero(~found.is_null().to_numpy(zero_copy_only=False))
        rows_Q[found.drop_null().to_numpy()] = start + places
    return rows_Q


def _are_the_same(first: Dataset, row: int, second: Dataset, other: int) -> bool:
    sizes = [
        None if index.num_bytes_N is None else int(index.num_bytes_N[place])
        for index, place in ((first.index, row), (second.index, other))
    ]
    if sizes[0] != sizes[1]:
        return False
    if first.pixels_NHWC is not None and second.pixels_NHWC is not None:
        return np.array_equal(first.pixels_NHWC[row], second.pixels_NHWC[other])
    one, two = first.read, second.read
    checksums = [read.checksum_N if isinstance(read, ShardReader) else None for read in (one, two)]
    if checksums[0] is not None and checksums[1] is not None:
        return bool(checksums[0][row] == checksums[1][other])
    if one is None or two is None or getattr(one, "is_remote", False) or getattr(two, "is_remote", False):
        return False  # a request for each image would cost more than it tells
    try:
        return one(row) == two(other)
    except ValueError:
        return False  # damaged: no image
