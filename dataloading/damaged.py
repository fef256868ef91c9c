"""Damaged images: which rows cannot be decoded, and whose pixels stand in for them.

A damaged row keeps its place in the stream and its index; it shows the pixels of the next good row (for the batch
statistics only) and counts as invalid, so that it gets no loss and its bank row is not written.

Shapes: B samples, N rows of the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dataloading.index import DatasetIndex


@dataclass(frozen=True)
class BadRow:
    """An image that cannot be used."""

    row: int
    name: str
    reason: str


class NoGoodImage(ValueError):
    """Not one image of a data set can be decoded."""


class DamagedRows:
    """The bad rows: those of the index, which are never looked at, and a record of those that failed since.

    The record changes no result. Whether an image decodes may depend on the window (half a JPEG file still has its
    upper half), so every visit of a recorded row is tried again; else pixels would depend on what a rank has seen.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._found: dict[int, BadRow] = {}

    def add(self, row: int, reason: str) -> None:
        """Record that `row` could not be decoded. reason: one line for people."""
        self._found.setdefault(row, BadRow(row, self._index.names[row], reason))

    def is_recorded(self, row: int) -> bool:
        """Return whether the row failed before. Safe to call in threads."""
        return row in self._found

    def found(self, start: int = 0) -> list[BadRow]:
        """Return the rows that failed, in the order in which they did, without the first `start`."""
        return list(self._found.values())[start:]

    def stand_ins(self, rows_B: NDArray[np.int64], failed: Mapping[int, set[int]]) -> NDArray[np.int64]:
        """Return for each row the row whose pixels are shown: itself or the next good one (cyclic), int64 (B,).

        failed: per sample (its place in rows_B) the rows that failed to decode for it. Raises NoGoodImage if no row is
        left for a sample.
        """
        stand_ins_B = rows_B.copy()
        for sample in {*np.flatnonzero(self._index.bad_N[rows_B]).tolist(), *failed}:
            stand_ins_B[sample] = self._next_good(int(rows_B[sample]), failed.get(sample, set()))
        return stand_ins_B

    def _next_good(self, row: int, failed: set[int]) -> int:
        bad_N = self._index.bad_N
        for start, stop in ((row, len(bad_N)), (0, row)):
            while start < stop:
                start += int(np.argmin(bad_N[start:stop]))
                if not bad_N[start] and start not in failed:
                    return start
                start = start + 1 if start in failed else stop
        raise NoGoodImage(
            f"no image of {self._index.source} can be decoded: found {len(bad_N)} rows, all damaged (last tried for "
            f"row {row}, {self._index.names[row]}); expected at least one good image, check the data"
        )
