"""Rows as they were at one moment, read piece by piece while their owner goes on writing them.

A snapshot copies nothing when it is taken. The owner saves the old values of the rows that it is about to write, as
long as they have not been read (copy on write); whoever reads gets the live rows, patched with those values.

Shapes: R rows of this rank, U rows of one write, P rows of one piece.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from cluster.row_table import row_view

_YIELD_S = 0.0002


class RowGuard:
    """Stands between the owner of rows, who writes them, and the snapshots of them that are still being read.

    Tables with the same row numbers, written together, share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshots: list[FrozenRows] = []
        self._writer_waits = False

    @contextmanager
    def writing(self, places_U: np.ndarray) -> Iterator[None]:
        """Hold this around every write. places_U: int64, the rows (0 to R - 1) that are about to change."""
        # Snapshots begin in the thread that writes, so that none can begin here.
        if not self._snapshots:
            yield
            return
        try:
            self._writer_waits = True
            with self._lock:
                self._writer_waits = False
                for snapshot in self._snapshots:
                    snapshot.keep(places_U)
                yield
        finally:
            # Ctrl-C can end the wait for the lock: readers must not wait for this writer for ever.
            self._writer_waits = False

    def freeze(self, rows: Tensor, last_step: Tensor | None = None) -> FrozenRows:
        """Return the rows, (R, ...) in host memory, as they are now. Called by the thread that writes, between writes.

        last_step: int32 (R,), the step in which each row was last written; `FrozenRows.read_written` needs it.
        """
        snapshot = FrozenRows(self, rows, last_step)
        with self._lock:
            self._snapshots.append(snapshot)
        return snapshot

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the owner from writing. An owner that waits goes first: locks are not fair."""
        while self._writer_waits:
            time.sleep(_YIELD_S)
        with self._lock:
            yield

    def release(self, snapshot: FrozenRows) -> None:
        """Forget a snapshot."""
        with self._lock:
            self._snapshots = [s for s in self._snapshots if s is not snapshot]


class FrozenRows:
    """A snapshot of rows. Read it once, in rising order of rows, in one thread; then release it."""

    def __init__(self, guard: RowGuard, rows: Tensor, last_step: Tensor | None) -> None:
        self._guard = guard
        self._rows = row_view(rows)
        self._last = None if last_step is None else last_step.numpy()
        self._next = 0
        self._is_kept: np.ndarray | None = None
        self._places = _Slab(np.empty((0,), np.int64))
        self._old_rows = _Slab(self._rows[:0])
        self._old_last = None if self._last is None else _Slab(self._last[:0])

    def __len__(self) -> int:
        return len(self._rows)

    def keep(self, places_U: np.ndarray) -> None:
        """Save the values of rows that are about to be written. The guard's lock is held."""
        places_U = places_U[places_U >= self._next]
        if self._is_kept is None:
            self._is_kept = np.zeros(len(self._rows), bool)
        places_U = places_U[~self._is_kept[places_U]]
        self._is_kept[places_U] = True
        self._places.append(places_U)
        self._old_rows.append(self._rows[places_U])
        if self._old_last is not None and self._last is not None:
            self._old_last.append(self._last[places_U])

    def read(self, stop: int, out_PX: np.ndarray) -> None:
        """Copy the rows from where the last read ended up to `stop` into `out_PX`, bytes (P, X)."""
        start = self._next
        with self._guard.reading():
            np.copyto(out_PX, self._rows[start:stop])
            self._next = stop
            kept = self._kept_in(start, stop)
        out_PX[self._places.values[kept] - start] = self._old_rows.values[kept]

    def read_written(self, stop: int, since: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows up to `stop` were written in step `since` or later, int64 (P,), and their bytes (P, X)."""
        assert self._last is not None, "frozen without the steps of the last writes"
        assert self._old_last is not None
        start = self._next
        with self._guard.reading():
            last = self._last[start:stop].copy()
            kept = self._kept_in(start, stop)
            last[self._places.values[kept] - start] = self._old_last.values[kept]
            places_P = np.flatnonzero(last >= since) + start
            rows_PX = self._rows[places_P]
            self._next = stop
        wanted = kept[last[self._places.values[kept] - start] >= since]
        rows_PX[np.searchsorted(places_P, self._places.values[wanted])] = self._old_rows.values[wanted]
        return places_P, rows_PX

    def release(self) -> None:
        """Free what was kept; the owner writes freely again."""
        self._guard.release(self)

    def _kept_in(self, start: int, stop: int) -> np.ndarray:
        """Return where among the kept values those of rows [start, stop) are."""
        places = self._places.values
        return np.flatnonzero((places >= start) & (places < stop))


class _Slab:
    """An array that grows at its end."""

    def __init__(self, empty: np.ndarray) -> None:
        self._buffer, self._length = empty.copy(), 0

    @property
    def values(self) -> np.ndarray:
        return self._buffer[: self._length]

    def append(self, more: np.ndarray) -> None:
        needed = self._length + len(more)
        if needed > len(self._buffer):
            larger = np.empty((max(needed, 2 * len(self._buffer)), *self._buffer.shape[1:]), self._buffer.dtype)
            larger[: self._length] = self.values
            self._buffer = larger
        self._buffer[self._length : needed] = more
        self._length = needed
