"""Damaged images: which rows cannot be decoded, and whose pixels stand in for them.

A damaged row keeps its place in the stream and its index; it shows the pixels of the next good row (for the batch
statistics only) and counts as invalid, so that it gets no loss and its bank row is not written.

Shapes: B samples, N rows of the dataset.
"""

from __future__ import annotations

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


class DamagedRows:
    """The bad rows known so far: those of the index, and those that failed since. A row fails only once."""

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._bad_N = np.array(index.bad_N, dtype=bool)
        self._found: dict[int, BadRow] = {}

    def add(self, row: int, reason: str) -> None:
        """Remember that `row` cannot be decoded. reason: one line for people."""
        self._bad_N[row] = True
        self._found.setdefault(row, BadRow(row, self._index.names[row], reason))

    def rows(self) -> list[BadRow]:
        """Return all bad rows by number, those of the index first known included."""
        listed = (int(row) for row in np.flatnonzero(self._index.bad_N))
        known = {row: BadRow(row, self._index.names[row], self._index.reasons.get(row, "")) for row in listed}
        return [bad for _, bad in sorted((known | self._found).items())]

    def stand_ins(self, rows_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return for each row the row whose pixels are shown: itself, or the next good one (cyclic), int64 (B,).

        Raises ValueError if no row is good.
        """
        stand_ins_B = rows_B.copy()
        for sample in np.flatnonzero(self._bad_N[rows_B]):
            stand_ins_B[sample] = self._next_good(int(rows_B[sample]))
        return stand_ins_B

    def _next_good(self, row: int) -> int:
        for part, start in ((self._bad_N[row:], row), (self._bad_N[:row], 0)):
            good = int(np.argmin(part)) if len(part) else 0
            if len(part) and not part[good]:
                return start + good
        raise ValueError(
            f"no image of {self._index.source} can be decoded: found {len(self._bad_N)} rows, all damaged, the last "
            f"failure at row {row} ({self._index.names[row]}); expected at least one good image, check the data"
        )
