"""Whether the manifest of packed images can be what was written: checks before anything is read by what it says.

Shapes: N rows, R of them at a time, S shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataloading.index import MAX_CLASSES, DatasetIndex

if TYPE_CHECKING:
    from dataloading.shards import Shard

_ROWS_AT_ONCE = 1 << 22


def check_shard(shard: Shard, piece_bytes: int) -> None:
    """Raise ValueError or TypeError for what is no shard; a manifest must not point outside of its folder."""
    if not shard.name or Path(shard.name).name != shard.name or shard.name.startswith("."):
        raise ValueError(f"shard name {shard.name!r}")
    if not (type(shard.num_bytes) is type(shard.num_rows) is int and shard.num_bytes >= 0 and shard.num_rows >= 0):
        raise ValueError(f"shard {shard.name} of {shard.num_bytes!r} bytes, {shard.num_rows!r} rows")
    if len(shard.pieces) != -(-shard.num_bytes // piece_bytes) or not all(type(p) is str for p in shard.pieces):
        raise ValueError(f"shard {shard.name} of {shard.num_bytes:,} bytes with {len(shard.pieces)} checksums")


def check_values(index: DatasetIndex) -> None:
    """Raise ValueError where a value of a column cannot be."""
    num_rows, labels_N = index.num_rows, index.labels_N
    if num_rows == 0:
        return
    limit = len(index.class_names) or MAX_CLASSES
    if labels_N is not None and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < limit:
        raise ValueError(f"labels from {labels_N.min()} to {labels_N.max()}, expected 0 to {limit - 1}")
    if index.bad_N.view(np.uint8).max() > 1:
        raise ValueError("a row that is neither damaged nor not")
    if min(int(index.heights_N.min()), int(index.widths_N.min())) < 0:
        raise ValueError("an image of negative size")
    if not all(0 <= row < num_rows for row in index.reasons):
        raise ValueError(f"a reason for damage of a row beyond {num_rows}")


def check_places(shards: Sequence[Shard], values: dict[str, NDArray]) -> None:
    """Raise ValueError where the manifest contradicts itself: every image lies in its shard, every row has a place.

    Looks at every row once, few at a time: the columns stay in the mapped file.
    """
    num_bytes_S = np.array([shard.num_bytes for shard in shards], dtype=np.int64)
    num_rows_S = np.array([shard.num_rows for shard in shards], dtype=np.int64)
    shard_N, places_N, num_rows = values["shard"], values.get("row_of_place"), len(values["shard"])
    if int(num_rows_S.sum()) != num_rows:
        raise ValueError(f"{num_rows} rows, but shards of {int(num_rows_S.sum())}")
    seen_N = np.zeros(num_rows, dtype=np.bool_)
    counts_S, last = np.zeros_like(num_rows_S), 0
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        part = slice(first, min(num_rows, first + _ROWS_AT_ONCE))
        shard_R, offset_R, length_R = shard_N[part], values["offset"][part], values["length"][part]
        if shard_R.min() < 0 or shard_R.max() >= len(shards):
            raise ValueError(f"shard numbers from {shard_R.min()} to {shard_R.max()} of {len(shards)} shards")
        # Without a sum, which could overflow.
        if offset_R.min() < 0 or length_R.min() < 0 or (length_R > num_bytes_S[shard_R] - offset_R).any():
            raise ValueError(f"an image outside of its shard, among rows {part.start} to {part.stop - 1}")
        counts_S += np.bincount(shard_R, minlength=len(shards))
        if places_N is None:
            seen_N[part], shard_of_place_R = True, shard_R
        else:
            rows_R = places_N[part]
            if rows_R.min() < 0 or rows_R.max() >= num_rows:
                raise ValueError(f"places of rows {rows_R.min()} to {rows_R.max()} of {num_rows}")
            seen_N[rows_R], shard_of_place_R = True, shard_N[rows_R]
        if shard_of_place_R[0] < last or (np.diff(shard_of_place_R) < 0).any():
            raise ValueError(f"places {part.start} to {part.stop - 1} are not in the order of the shards")
        last = shard_of_place_R[-1]
    if not seen_N.all():
        raise ValueError(f"row {int(np.argmin(seen_N))} has no place, another has two")
    if (counts_S != num_rows_S).any():
        raise ValueError(f"shard {shards[int(np.argmax(counts_S != num_rows_S))].name} holds another number of rows")


def column_digest(column: pa.Array) -> str:
    """Return the sha256 (hex) of a column's values, however the array lies in memory."""
    digest = hashlib.sha256(f"{column.type} {len(column)} ".encode())
    if pa.types.is_large_binary(column.type):
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
        text = column.buffers()[2]
        digest.update(np.diff(offsets).tobytes())
        digest.update(memoryview(text)[offsets[0] : offsets[-1]] if text is not None else b"")
    else:
        width = column.type.byte_width if pa.types.is_fixed_size_binary(column.type) else column.type.bit_width // 8
        start = column.offset * width
        digest.update(memoryview(column.buffers()[1])[start : start + len(column) * width])
    return digest.hexdigest()
