"""What differs between two dataset indexes, as a sentence for people.

Shapes: N rows of the saved index, M rows of the current one, K rows that both have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dataloading.index import DatasetIndex

_NUM_SHOWN = 3


def describe_difference(saved: DatasetIndex, current: DatasetIndex) -> str | None:
    """Return what changed from `saved` to `current`, None if nothing did. Sizes, labels and digests are compared
    where both sides know them."""
    parts = _different_files(saved.files, current.files) + _different_rows(saved, current)
    if saved.class_names != current.class_names:
        parts.append(f"the classes were {_some(saved.class_names)} and are {_some(current.class_names)}")
    if not parts and saved.digest and current.digest and saved.digest != current.digest:
        parts.append("the names and byte sizes are the same, but the contents of the images differ")
    if not parts:
        return None
    counts = f"{saved.num_rows:,} images before, {current.num_rows:,} now"
    return f"{counts}: {'; '.join(parts)}"


def _different_rows(saved: DatasetIndex, current: DatasetIndex) -> list[str]:
    names_before, names_now = list(saved.names), list(current.names)
    if names_before == names_now:
        rows_K = np.arange(saved.num_rows)
        return _different_values(saved, current, rows_K, rows_K)
    row_now = {name: row for row, name in enumerate(names_now)}
    removed = [name for name in names_before if name not in row_now]
    before_K = np.array([row for row, name in enumerate(names_before) if name in row_now], dtype=np.int64)
    now_K = np.array([row_now[names_before[row]] for row in before_K], dtype=np.int64)
    is_added = np.ones(current.num_rows, dtype=np.bool_)
    is_added[now_K] = False
    added = [names_now[row] for row in np.flatnonzero(is_added)]
    parts = [
        f"{len(names):,} {what} ({_some(names)})" for names, what in ((added, "added"), (removed, "removed")) if names
    ]
    if not parts:
        parts.append(f"the order differs (row {int(np.argmax(before_K != now_K))} is the first)")
    return parts + _different_values(saved, current, before_K, now_K)


def _different_values(
    saved: DatasetIndex, current: DatasetIndex, before_K: NDArray[np.int64], now_K: NDArray[np.int64]
) -> list[str]:
    parts = []
    for what, values_before, values_now in (
        ("of another byte size", saved.num_bytes_N, current.num_bytes_N),
        ("with another label", saved.labels_N, current.labels_N),
    ):
        if values_before is None or values_now is None:
            continue
        other = before_K[values_before[before_K] != values_now[now_K]]
        if other.size:
            shown = [saved.names[int(row)] for row in other[: _NUM_SHOWN + 1]]
            parts.append(f"{other.size:,} {what} ({_some(shown)})")
    return parts


def _different_files(saved: dict[str, int], current: dict[str, int]) -> list[str]:
    added = sorted(current.keys() - saved.keys())
    removed = sorted(saved.keys() - current.keys())
    resized = [name for name in saved if current.get(name, saved[name]) != saved[name]]
    return [
        f"{len(names):,} files {what} ({_some(names)})"
        for names, what in ((added, "added"), (removed, "removed"), (resized, "of another byte size"))
        if names
    ]


def _some(names: Sequence[str]) -> str:
    """Return the first few of `names`, so that a message stays one line whatever changed."""
    if not names:
        return "none"
    return ", ".join(names[:_NUM_SHOWN]) + (", …" if len(names) > _NUM_SHOWN else "")
