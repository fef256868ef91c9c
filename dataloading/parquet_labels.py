"""The labels in the columns of parquet files: whole numbers, or texts that become classes.

Shapes: N rows.
"""

# pyarrow makes the functions of its module compute as it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataloading.index import MAX_CLASSES, DatasetError
from dataloading.labels import MAX_LABEL_BYTES, Labels, no_labels, numbered, spelt
from dataloading.parquet_reader import DELTAS, encodings

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "cls", "target", "category")
"""The first of them that is there holds the labels, in any case."""
_TEXTS_TOGETHER = 1024


def label_column(schema: pa.Schema) -> str | None:
    """Return the column that holds the labels, None where there is none."""
    by_lower = {name.lower(): name for name in reversed(schema.names)}
    return next((by_lower[name] for name in LABEL_COLUMNS if name in by_lower), None)


def class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """Return the class names of the Hugging Face metadata, () where there are none."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


class TooLong(ValueError):
    """A text that is too long to be the name of a class."""


def is_label_kind(kind: pa.DataType) -> bool:
    """Whether a column's values may be labels."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_number = types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return is_number or types.is_null(kind) or _is_text(kind)


def read_labels(path: Path, name: str) -> pa.ChunkedArray:
    """Return a column of labels, texts and numbers as they are, no dictionaries.

    Raises TooLong for a text that is no class name: a file of 150 kB may hold 60 GB of them. Raises DatasetError where
    the column cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            kind = file.schema_arrow.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not _is_text(kind):
            column = pq.ParquetFile(path).read([name]).column(0)
            return _signed(column.cast(kind), path, name)
        chunks = []
        with pq.ParquetFile(path, read_dictionary=None if encodings(path, name) & DELTAS else [name]) as file:
            row = 0
            for batch in file.iter_batches(_TEXTS_TOGETHER, columns=[name], use_threads=False):
                texts = batch.column(0)
                _check_lengths(texts.dictionary if pa.types.is_dictionary(texts.type) else texts, path, name, row)
                chunks.append(texts.cast(pa.large_string()))
                row += len(texts)
        return pa.chunked_array(chunks, pa.large_string())
    except TooLong:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, (DatasetError, MemoryError)) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise DatasetError(f"{path}, column {name}: {error}; fetch or write the file again") from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _check_lengths(texts: pa.Array, path: Path, name: str, row: int) -> None:
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    if longest > MAX_LABEL_BYTES:
        raise TooLong(
            f"column {name} of {path.name} holds a text of {longest:,} bytes in or after row {row:,}; expected names "
            f"of classes of at most {MAX_LABEL_BYTES} bytes"
        )


def _signed(column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    """Return numbers with a sign where they had none. Raises DatasetError for a number that has no such form."""
    if not pa.types.is_uint64(column.type):
        return column
    largest = pc.max(column).as_py() or 0
    if largest >= MAX_CLASSES:
        raise DatasetError(
            f"column {name} of {path}, row {pc.index(column, largest).as_py():,}: found label {largest}, expected "
            f"below {MAX_CLASSES:,}. Correct or remove it"
        )
    return column.cast(pa.int64())


def column_labels(column: pa.ChunkedArray, name: str, names: tuple[str, ...], place: Callable[[int], str]) -> Labels:
    """Return the labels of a column, or why there are none.

    name: of the column. names: class names that the files state. place(row): file and row, for messages. Raises
    DatasetError for a number that is beyond the class names, or that no count of classes reaches.
    """
    kind = column.type
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        return no_labels(
            f"column {name} is null in {place(row)} ({column.null_count:,} of {len(column):,} rows)", column.null_count
        )
    if _is_text(kind):
        return spelt(column.to_pylist(), lambda row: f"column {name} of {place(row)}")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values_N = column.cast(pa.float64()).to_numpy()
        odd = ~(np.isfinite(values_N) & (np.abs(values_N) < 2**53) & (np.floor(values_N) == values_N))
        if odd.any():
            row = int(np.argmax(odd))
            return no_labels(
                f"column {name} is {values_N[row]:g} in {place(row)}, no whole number "
                f"({int(odd.sum()):,} of {len(column):,} rows)",
                int(odd.sum()),
            )
    return _numbers(pc.cast(column, pa.int64(), safe=False), name, names, place)


def _numbers(column: pa.ChunkedArray, name: str, names: tuple[str, ...], place: Callable[[int], str]) -> Labels:
    labels_N = column.to_numpy()
    if names and labels_N.max() >= len(names):
        row = int(labels_N.argmax())
        raise DatasetError(
            f"column {name} of {place(row)}: found label {labels_N[row]}, expected below {len(names):,}, the number of "
            "class names. Correct or remove the column"
        )
    found = numbered(labels_N, lambda row: f"column {name} of {place(row)}")
    return found if found.labels_N is None or not names else Labels(found.labels_N, names, found.notes)
