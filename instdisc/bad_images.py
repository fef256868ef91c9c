"""The damaged images of a run: `bad_images.jsonl` names each with the reason, and too many of them end the run.

A line is one JSON document: {"row", "name", "reason", "step"}. step: the step before which it turned out, None for an
image that the index already knew as damaged. Lines are in the order of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.store import ObjectMissingError, Store
from dataloading.index import DatasetError, DatasetIndex

BAD_IMAGES = "bad_images.jsonl"
BAD_TEST_IMAGES = "bad_test_images.jsonl"
"""Test images that are no queries of kNN, in lines of the same form."""
_NUM_SHOWN = 3


@dataclass(frozen=True)
class BadImage:
    """One damaged image."""

    row: int
    name: str
    reason: str
    step: int | None

    def to_line(self) -> str:
        return json.dumps({"row": self.row, "name": self.name, "reason": self.reason, "step": self.step})


class BadImages:
    """The damaged training images that a run knows of, those of earlier attempts included."""

    def __init__(self, index: DatasetIndex, max_share: float, earlier: Iterable[BadImage] = ()) -> None:
        self._num_rows, self._max_share, self._source = index.num_rows, max_share, index.source
        # What the index knows is not told by an earlier attempt: another index may have been made of the same images.
        self._by_row = {bad.row: bad for bad in earlier if bad.step is not None and bad.row < index.num_rows}
        for row in index.bad_N.nonzero()[0].tolist():
            self._by_row[row] = BadImage(row, index.names[row], index.reasons.get(row, ""), None)

    def __len__(self) -> int:
        return len(self._by_row)

    def add(self, found: Iterable[BadImage]) -> list[BadImage]:
        """Take note of images that failed, and return those that were not known."""
        new = []
        for bad in found:
            if bad.row not in self._by_row:
                self._by_row[bad.row] = bad
                new.append(bad)
        return new

    def check(self) -> None:
        """Raise DatasetError where the damaged images are more than the share of all images that a run accepts."""
        if len(self) <= self._max_share * self._num_rows:
            return
        shown = "; ".join(f"{bad.name}: {bad.reason}" for bad in self._sorted()[:_NUM_SHOWN])
        raise DatasetError(
            f"{self._source}: found {len(self):,} damaged images of {self._num_rows:,}, expected at most "
            f"{self._max_share:.3g} of them (data.max_bad_share), for instance {shown}. {BAD_IMAGES} in the run names "
            "all that are known. Repair or remove them and start a new run, or allow a larger share"
        )

    def to_jsonl(self) -> bytes:
        """Return the report."""
        return to_jsonl(self._sorted())

    def _sorted(self) -> Sequence[BadImage]:
        return [self._by_row[row] for row in sorted(self._by_row)]


def to_jsonl(images: Iterable[BadImage]) -> bytes:
    """Return a line for each image."""
    return "".join(f"{bad.to_line()}\n" for bad in images).encode()


def read_bad_images(store: Store) -> list[BadImage]:
    """Return what the report of a run says, [] where there is none. Raises DatasetError where it cannot be read."""
    try:
        lines = store.get(BAD_IMAGES).decode().splitlines()
        return [BadImage(**json.loads(line)) for line in lines]
    except ObjectMissingError:
        return []
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{BAD_IMAGES} in {store.uri} cannot be read ({error}); it is only a report: remove it, and the images "
            "that are still damaged are found again"
        ) from error
