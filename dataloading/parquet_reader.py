"""Reads encoded images out of parquet files, by row and from many threads.

A parquet file can only be read by whole row groups, so the ones used last are kept, up to a number of bytes. Data sets
that fit are read once; a larger one, read in random order, costs a row group per image and belongs in a folder.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

MAX_KEPT_BYTES = 4 << 30
"""How many bytes of encoded images are kept in memory by one reader."""


class ParquetReader:
    """Calling it with a row returns the encoded image: bytes. Raises OSError where it cannot be read, ValueError where
    the row holds none."""

    def __init__(
        self, paths: tuple[Path, ...], starts: tuple[int, ...], column: str, max_kept_bytes: int = MAX_KEPT_BYTES
    ) -> None:
        """starts: the first row of each file, and the number of rows at the end. column: path of the leaf column."""
        self.paths = paths
        self.starts = starts
        self.column = column
        self.max_kept_bytes = max_kept_bytes
        self._kept: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()
        self._group_starts: dict[int, list[int]] = {}
        # One lock for reading too: two threads that miss the same row group would read it twice.
        self._lock = threading.Lock()

    def __reduce__(self):
        return ParquetReader, (self.paths, self.starts, self.column, self.max_kept_bytes)

    def __call__(self, row: int) -> bytes:
        file = bisect_right(self.starts, row) - 1
        with self._lock:
            group_starts = self._starts_of_groups(file)
            group = bisect_right(group_starts, row - self.starts[file]) - 1
            images = self._group(file, group)
        image = images[row - self.starts[file] - group_starts[group]].as_py()
        if image is None:
            raise ValueError(f"{self.paths[file]}: row {row - self.starts[file]} holds no bytes")
        return image

    is_remote = False

    def subset(self, rows_R: NDArray[np.int64]) -> RowsOf:
        """Return the reader of some rows, numbered from 0."""
        return RowsOf(self, rows_R)

    def batches(self, num_rows: int, batch_size: int) -> Iterator[list[bytes | None]]:
        """Yield the images of rows 0..num_rows-1 in order, in lists of at most `batch_size`."""
        left = num_rows
        for path in self.paths:
            if left == 0:
                return
            with pq.ParquetFile(path, memory_map=True) as file:
                for batch in file.iter_batches(batch_size, columns=[self.column], use_threads=False):
                    images = _leaf(batch.column(0))[:left].to_pylist()
                    left -= len(images)
                    if images:
                        yield images
                    if left == 0:
                        break

    def _starts_of_groups(self, file: int) -> list[int]:
        if file not in self._group_starts:
            metadata = pq.read_metadata(self.paths[file])
            starts = [0]
            for group in range(metadata.num_row_groups):
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
            self._group_starts[file] = starts
        return self._group_starts[file]

    def _group(self, file: int, group: int) -> pa.ChunkedArray:
        key = (file, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with pq.ParquetFile(self.paths[file], memory_map=True) as opened:
            column = opened.read_row_group(group, columns=[self.column], use_threads=False).column(0)
        images = pa.chunked_array([_leaf(chunk) for chunk in column.chunks])
        self._kept[key] = images
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.max_kept_bytes:
            self._kept.popitem(last=False)
        return images


@dataclass(frozen=True, eq=False)
class RowsOf:
    """Some rows of a reader, numbered from 0."""

    reader: ParquetReader
    rows_R: NDArray[np.int64]
    is_remote = False

    def __call__(self, row: int) -> bytes:
        return self.reader(int(self.rows_R[row]))

    def subset(self, rows_R: NDArray[np.int64]) -> RowsOf:
        """Return the reader of some of these rows."""
        return RowsOf(self.reader, self.rows_R[rows_R])


def _leaf(array: pa.Array) -> pa.Array:
    """Return the bytes of a struct column, or the column itself."""
    return array.flatten()[0] if pa.types.is_struct(array.type) else array
