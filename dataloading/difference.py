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
    rows_before_K, rows_now_K, parts = _different_names(saved.names, current.names)
    if saved.files:  # an earlier version did not keep those of tars
        parts += _different_files(saved.files, current.files)
    parts += _different_values(saved, "num_bytes_N", current, rows_before_K, rows_now_K)
    if not parts and saved.digest and current.digest and saved.digest != current.digest:
        parts.append("the names and byte sizes are the same, but the contents of the images differ")
    parts += _different_values(saved, "labels_N", current, rows_before_K, rows_now_K)
    are_labelled = saved.labels_N is not None and current.labels_N is not None
    if are_labelled and saved.class_names != current.class_names:
        parts.append(f"the classes were {_some(saved.class_names)} and are {_some(current.class_names)}")
    if not parts:
        return None
    counts = f"{saved.num_rows:,} images before, {current.num_rows:,} now"
    return f"{counts}: {'; '.join(parts)}"


def _different_names(
    saved: Sequence[str], current: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Return the rows of the names that both lists have, in the saved and in the current one, and what differs."""
    before, now = list(saved), list(current)
    if before == now:
        rows_K = np.arange(len(now))
        return rows_K, rows_K, []
    row_now = {name: row for row, name in enumerate(now)}
    removed = [name for name in before if name not in row_now]
    before_K = np.array([row for row, name in enumerate(before) if name in row_now], dtype=np.int64)
    now_K = np.array([row_now[before[row]] for row in before_K], dtype=np.int64)
    is_added = np.ones(len(now), dtype=np.bool_)
    is_added[now_K] = False
    added = [now[row] for row in np.flatnonzero(is_added)]
    parts = [
        f"{len(names):,} {what} ({_some(names)})" for names, what in ((added, "added"), (removed, "removed")) if names
    ]
    if not parts:
        parts.append(f"the order differs (row {int(np.argmax(before_K != now_K))} is the first)")
    return before_K, now_K, parts


_WHAT = {"num_bytes_N": "of another byte size", "labels_N": "with another label"}


def _different_values(
    saved: DatasetIndex,
    column: str,
    current: DatasetIndex,
    before_K: NDArray[np.int64],
    now_K: NDArray[np.int64],
) -> list[str]:
    values_before, values_now = getattr(saved, column), getattr(current, column)
    if values_before is None or values_now is None:
        return []
    other = before_K[values_before[before_K] != values_now[now_K]]
    shown = [saved.names[int(row)] for row in other[: _NUM_SHOWN + 1]]
    return [f"{other.size:,} {_WHAT[column]} ({_some(shown)})"] if other.size else []


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
