"""The labels in the columns of parquet files: whole numbers, or texts that become classes.

Shapes: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataloading.index import DatasetError
from dataloading.labels import Labels, no_labels, numbered, spelt

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "cls", "target", "category")
"""The first of them that is there holds the labels, in any case."""


def label_column(schema: pa.Schema) -> str | None:
    """Return the column that holds the labels, None where there is none."""
    by_lower = {name.lower(): name for name in reversed(schema.names)}
    return next((by_lower[name] for name in LABEL_COLUMNS if name in by_lower), None)


def class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """Return the class names of the Hugging Face metadata, () where there are none."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return tuple(str(name) for name in about["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


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
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
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
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return no_labels(f"column {name} of {place(0).partition(',')[0]} holds {kind}; expected whole numbers or texts")
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
