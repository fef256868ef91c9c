"""Plans: all that decides the pixels of a batch, before any image is touched.

A plan is a pure function of the rows, their visits and of what failed to decode for them. When an image turns out to be
damaged the same rows are planned again, and only the samples that showed it change.

Shapes: B samples of a batch, V views, M = V * B windows (view by view), 2 (vertical, horizontal).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dataloading.augment import AugmentConfig, ColorFactors, color_factors, crop_windows, eval_windows
from dataloading.damaged import DamagedRows

if TYPE_CHECKING:
    from dataloading.index import DatasetIndex


Failed = Mapping[int, set[int]]
"""Per sample (its place in the batch): the rows whose images failed to decode for it."""
_NONE: Failed = MappingProxyType({})


@dataclass(frozen=True)
class Plan:
    """What to show for B rows of the dataset."""

    rows_B: NDArray[np.int64]
    visits_B: NDArray[np.int64]
    valid_B: NDArray[np.bool_]
    """False where a row is damaged and shows the pixels of another."""
    sources_M: NDArray[np.int64]
    """The row whose pixels are shown."""
    anchors_M2: NDArray[np.int64]
    sizes_M2: NDArray[np.int64]
    factors: ColorFactors | None
    """Colour parameters of the M windows; None: no colour augmentation."""

    @property
    def num_windows(self) -> int:
        return len(self.sources_M)


class Planner(Protocol):
    def plan(self, rows_B: NDArray[np.int64], visits_B: NDArray[np.int64], failed: Failed = _NONE) -> Plan:
        """Return the plan for the rows; bad rows of the index, and rows that failed for a sample, are replaced."""
        ...


class TrainPlanner:
    """Random windows and colours. The numbers are those of the row itself even where another row stands in for it."""

    def __init__(
        self, index: DatasetIndex, damaged: DamagedRows, augment: AugmentConfig, seed: int, first_view: int = 0
    ) -> None:
        """first_view: number of the first of the views, which decides its random numbers."""
        self._index, self._damaged, self._augment, self._seed = index, damaged, augment, seed
        self._views = range(first_view, first_view + augment.num_views)

    def plan(self, rows_B: NDArray[np.int64], visits_B: NDArray[np.int64], failed: Failed = _NONE) -> Plan:
        augment, stand_ins_B = self._augment, self._damaged.stand_ins(rows_B, failed)
        heights_B, widths_B = self._index.heights_N[stand_ins_B], self._index.widths_N[stand_ins_B]
        windows, factors = [], []
        for view in self._views:
            where = (self._seed, visits_B, rows_B, heights_B, widths_B)
            windows.append(crop_windows(*where, view=view, scale=augment.scale, ratio=augment.ratio))
            factors.append(color_factors(self._seed, visits_B, rows_B, view=view, config=augment))
        anchors, sizes = zip(*windows, strict=True)
        return Plan(
            rows_B=rows_B,
            visits_B=visits_B,
            valid_B=stand_ins_B == rows_B,
            sources_M=np.tile(stand_ins_B, augment.num_views),
            anchors_M2=np.concatenate(anchors),
            sizes_M2=np.concatenate(sizes),
            factors=ColorFactors.concatenate(factors),
        )


class EvalPlanner:
    """The central window of every image, as it is."""

    def __init__(self, index: DatasetIndex, damaged: DamagedRows, resize: int, crop: int) -> None:
        self._index, self._damaged, self._resize, self._crop = index, damaged, resize, crop

    def plan(self, rows_B: NDArray[np.int64], visits_B: NDArray[np.int64], failed: Failed = _NONE) -> Plan:
        stand_ins_B = self._damaged.stand_ins(rows_B, failed)
        heights_B, widths_B = self._index.heights_N[stand_ins_B], self._index.widths_N[stand_ins_B]
        anchors_B2, sizes_B2 = eval_windows(heights_B, widths_B, resize=self._resize, crop=self._crop)
        return Plan(rows_B, visits_B, stand_ins_B == rows_B, stand_ins_B, anchors_B2, sizes_B2, None)
