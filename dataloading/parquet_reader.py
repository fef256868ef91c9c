"""Reads encoded images out of parquet files, by row and from many threads.

A parquet file can only be read by whole row groups, so the ones used last are kept, up to a number of bytes. Data sets
that fit are read once; a larger one, read in random order, costs a row group per image and belongs in a folder.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataloading.read_errors import raise_if_of_memory

MAX_ENCODED_BYTES = 256 << 20
"""No encoded image is larger: as many bytes as the pixels of the largest that is decoded."""
_MAX_UNPACKED_BYTES, _MAX_RATIO = 64 << 20, 100
"""A column of a row group that claims to be larger than both, the ratio being that to the bytes in the file, is a
decompression bomb: encoded images are compressed already. It is read row by row, and not at all beyond twice the
largest image."""
_OVERHEAD_BYTES = 1 << 20
"""Of a column beside its images."""
_TOGETHER = 64
_LIST_BYTES = 64 << 20
MAX_KEPT_BYTES = 4 << 30
"""How many bytes of encoded images are kept in memory by one reader."""


_PREFIXES = "DELTA_BYTE_ARRAY"
DELTAS = frozenset({"DELTA_LENGTH_BYTE_ARRAY", _PREFIXES})
"""Encodings that cannot be read as dictionaries."""


def encodings(path: Path, column: str) -> frozenset[str]:
    """Return the encodings of a leaf column."""
    about = pq.read_metadata(path)
    groups = map(about.row_group, range(about.num_row_groups))
    chunks = (group.column(place) for group in groups for place in range(group.num_columns))
    return frozenset(encoding for chunk in chunks if chunk.path_in_schema == column for encoding in chunk.encodings)


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
        self._encodings: dict[int, frozenset[str]] = {}
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
        place = row - self.starts[file] - group_starts[group]
        where = f"{self.paths[file]}, row group {group}, row {place}"
        if place >= len(images):
            raise ValueError(f"{where}: the file says that it has it, but it has not")
        image = _image_of(images[place], where)
        if isinstance(image, ValueError):
            raise image
        return image

    is_remote = False

    def subset(self, rows_R: NDArray[np.int64]) -> RowsOf:
        """Return the reader of some rows, numbered from 0."""
        return RowsOf(self, rows_R)

    def batches(self, num_rows: int, batch_size: int) -> Iterator[list[bytes | ValueError]]:
        """Yield the images of rows 0..num_rows-1 in order, in lists of at most `batch_size`, or why a row has none."""
        left = num_rows
        for file in range(len(self.paths)):
            starts = self._starts_of_groups(file)
            for group in range(len(starts) - 1):
                rows = min(left, starts[group + 1] - starts[group])
                left -= rows
                yield from _in_lists(self._images(file, group, rows), batch_size)
                if left == 0:
                    return

    def _images(self, file: int, group: int, num_rows: int) -> Iterator[bytes | ValueError]:
        """Yield the first images of a row group; where it ends before, the reason instead of each that is missing."""
        where = f"{self.paths[file]}, row group {group}"
        why = ValueError(f"{where}: fewer rows than the file says that it has")
        done = num_bytes = 0
        try:
            with self._open(file) as opened, _named(self.paths[file], group):
                claimed = self._suspicious_bytes(opened, group)
                together = _TOGETHER if claimed is None else 1
                batches = opened.iter_batches(together, row_groups=[group], columns=[self.column], use_threads=False)
                while done < num_rows:
                    if claimed and num_rows - done == 1 and claimed - num_bytes > MAX_ENCODED_BYTES + _OVERHEAD_BYTES:
                        why = ValueError(f"{where}, row {done}: {_too_large(claimed - num_bytes)}")
                        break
                    if (batch := next(batches, None)) is None:
                        break
                    for scalar in _leaf(batch.column(0))[: num_rows - done]:
                        image = _image_of(scalar, f"{where}, row {done}")
                        num_bytes += len(image) if isinstance(image, bytes) else 0
                        yield image
                        done += 1
        except ValueError as error:
            why = error
        yield from (why for _ in range(num_rows - done))

    def _open(self, file: int) -> pq.ParquetFile:
        # As a dictionary: one image that a file has once for a million rows is in memory once.
        path = self.paths[file]
        if file not in self._encodings:
            self._encodings[file] = encodings(path, self.column)
        as_dictionary = None if self._encodings[file] & DELTAS else [self.column]
        return pq.ParquetFile(path, memory_map=True, read_dictionary=as_dictionary)

    def _suspicious_bytes(self, opened: pq.ParquetFile, group: int) -> int | None:
        """Return how much a row group claims to unpack to where that is suspicious: it is read row by row then.

        Raises ValueError where it is too much to be read at all.
        """
        about = opened.metadata.row_group(group)
        chunk = next(c for c in map(about.column, range(about.num_columns)) if c.path_in_schema == self.column)
        if _PREFIXES in chunk.encodings:  # a byte may stand for a whole image, and nothing says how many do
            raise ValueError(
                f"images in the encoding {_PREFIXES}, which is not read; write them in another, such as PLAIN"
            )
        claimed, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
        if claimed <= _MAX_UNPACKED_BYTES or claimed <= _MAX_RATIO * stored:
            return None
        if claimed > 2 * MAX_ENCODED_BYTES:
            raise ValueError(f"decompression bomb: {stored:,} bytes that claim to be {claimed:,}")
        return claimed

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
        with self._open(file) as opened, _named(self.paths[file], group):
            if self._suspicious_bytes(opened, group) is None:
                column = opened.read_row_group(group, columns=[self.column], use_threads=False).column(0)
                images = pa.chunked_array([_leaf(chunk) for chunk in column.chunks], _leaf_type(column.type))
            else:
                starts = self._starts_of_groups(file)
                found = self._images(file, group, starts[group + 1] - starts[group])
                images = pa.chunked_array(
                    [pa.array([image if isinstance(image, bytes) else None for image in found], pa.large_binary())]
                )
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


def _in_lists(images: Iterator[bytes | ValueError], most: int) -> Iterator[list[bytes | ValueError]]:
    """Yield what comes in lists of at most so many, and of not many more bytes than `_LIST_BYTES`."""
    found: list[bytes | ValueError] = []
    num_bytes = 0
    for image in images:
        found.append(image)
        num_bytes += len(image) if isinstance(image, bytes) else 0
        if len(found) == most or num_bytes > _LIST_BYTES:
            yield found
            found, num_bytes = [], 0
    if found:
        yield found


def _image_of(scalar: pa.Scalar, where: str) -> bytes | ValueError:
    """Return the encoded image, or why there is none."""
    value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    if value is None or not value.is_valid:
        return ValueError(f"{where}: the row holds no bytes (only a path?)")
    size = value.as_buffer().size
    if size > MAX_ENCODED_BYTES:
        return ValueError(f"{where}: {_too_large(size)}")
    return value.as_py()


def _too_large(num_bytes: int) -> str:
    return f"an image of some {num_bytes:,} bytes, expected at most {MAX_ENCODED_BYTES:,}"


@contextmanager
def _named(path: Path, group: int) -> Iterator[None]:
    """Name file and row group in an error of bytes that are wrong, which is a ValueError; errors of reading pass."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise_if_of_memory(error, f"row group {group} of {path}")
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}, row group {group}: {error}") from error


def _leaf_type(kind: pa.DataType) -> pa.DataType:
    return kind.field(0).type if pa.types.is_struct(kind) else kind


def _leaf(array: pa.Array) -> pa.Array:
    """Return the bytes of a struct column, or the column itself."""
    return array.flatten()[0] if pa.types.is_struct(array.type) else array
