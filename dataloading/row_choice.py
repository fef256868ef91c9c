"""Which rows of a list `max_rows` takes.

Lists are sorted, so that the first rows are those of the first classes: rows are spread over the whole list, one out of
each of as many equal parts, at a place that follows from the numbers alone. A regular distance would meet the period of
lists in which classes take turns. CIFAR's files and the demo images, which are in random order, give the first.

Shapes: N rows of the list, R rows that are taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataloading.notes import LEFT_OUT, Note
from dataloading.philox import Purpose, words

FIRST_ROWS_RULE = 1
"""The version of the layout rule (`dataloading.layout.Part`) by which the first rows were taken."""


def chosen_rows(num_rows: int, max_rows: int | None, *, spread: bool) -> NDArray[np.int64]:
    """Return the rows of 0..N-1 that are taken, rising, int64 (R,)."""
    if max_rows is None or max_rows >= num_rows or not spread:
        return np.arange(num_rows if max_rows is None else min(max_rows, num_rows), dtype=np.int64)
    borders = np.arange(max_rows + 1, dtype=np.int64) * num_rows // max_rows
    draws = words(0, 0, purpose=Purpose.ROW_CHOICE, num=max_rows)
    return borders[:-1] + (draws % np.diff(borders).astype(np.uint64)).astype(np.int64)


def choice_notes(num_rows: int, num_chosen: int, *, spread: bool) -> tuple[Note, ...]:
    """Return the note that some rows alone are taken; none where all are."""
    if num_chosen == num_rows:
        return ()
    which = "spread over all of them" if spread else "the first of them"
    return (Note(LEFT_OUT, f"{num_chosen:,} of {num_rows:,} images, {which}", num_rows - num_chosen),)
