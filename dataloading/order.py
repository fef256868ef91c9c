"""The order of images over an epoch, and the rows of a part of every step.

Two orders have the same guarantee (every image exactly once per epoch, the same positions at any number of workers):
the full permutation, and for data beyond a node's disk the block order of `dataloading.block_order`.

Shapes: P positions, B samples of a part of the G positions of a step, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading import stream
from dataloading.block_order import BlockOrder
from dataloading.choices import ORDERS
from dataloading.index import DatasetError

if TYPE_CHECKING:
    from dataloading.index import Dataset

_POSITIONS_AT_ONCE = 4096


class Order(Protocol):
    """Which row stands at which position of the stream; a row's epoch is its position divided by the number of rows."""

    @property
    def num_rows(self) -> int: ...

    def rows(self, positions_P: ArrayLike) -> NDArray[np.int64]:
        """Return the dataset row at each position, int64 (P,)."""
        ...


@dataclass(frozen=True)
class Permutation:
    """Every epoch a permutation of all rows, without memory at any size."""

    num_rows: int
    seed: int

    def rows(self, positions_P: ArrayLike) -> NDArray[np.int64]:
        """Return the dataset row at each position, int64 (P,)."""
        return stream.rows(positions_P, self.num_rows, self.seed)


class StepRows:
    """The rows of a part of every global step, computed for many steps at once.

    An order takes about as long for one position as for a thousand; a few thousand at a time make them free.
    offsets: the part [start, stop) of the G positions of a step.
    """

    def __init__(self, order: Order, global_batch: int, offsets: tuple[int, int]) -> None:
        self._order, self._global_batch = order, global_batch
        self._offsets_B = np.arange(*offsets, dtype=np.int64)
        self._steps = max(1, _POSITIONS_AT_ONCE // max(1, len(self._offsets_B)))
        self._block, self._rows_TB = -1, np.empty((0, 0), dtype=np.int64)

    def positions(self, step: int) -> NDArray[np.int64]:
        """Return the part's stream positions of a step, int64 (B,)."""
        return step * self._global_batch + self._offsets_B

    def visits(self, step: int) -> NDArray[np.int64]:
        """Return how often the rows of a step came before in the stream, int64 (B,)."""
        return stream.visits(self.positions(step), self._order.num_rows)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return the part's dataset rows of a step, int64 (B,)."""
        block, place = divmod(step, self._steps)
        if block != self._block:
            first = block * self._steps
            positions_TB = np.stack([self.positions(first + t) for t in range(self._steps)])
            rows_P = self._order.rows(positions_TB.reshape(-1))
            self._block, self._rows_TB = block, rows_P.reshape(positions_TB.shape)
        return self._rows_TB[place]


@dataclass(frozen=True)
class OrderConfig:
    """Which order an epoch has. Raises ValueError at construction for an unknown kind."""

    kind: str = "permutation"
    """One of `choices.ORDERS`."""
    lanes: int = 16
    """Block order: parts into which the shards are divided; each supplies a fixed part of every batch."""
    window: int = 4
    """Block order: shards of a lane whose images are mixed at a time."""

    def __post_init__(self) -> None:
        if self.kind not in ORDERS:
            raise ValueError(f"order: found {self.kind!r}, expected one of {', '.join(ORDERS)}")


def make_order(dataset: Dataset, config: OrderConfig, *, seed: int, global_batch: int) -> Order:
    """Return the order of a dataset's images. Raises DatasetError for the block order without shards."""
    if config.kind == "permutation":
        return Permutation(dataset.index.num_rows, seed)
    if dataset.shards is None:
        raise DatasetError(
            f"block order of {dataset.index.source}: found no shards, expected packed images; pack them (instdisc "
            "pack), or choose data.order permutation"
        )
    return BlockOrder(
        dataset.shards.num_rows_S,
        seed,
        global_batch,
        lanes=config.lanes,
        window=config.window,
        row_of_place_N=dataset.shards.row_of_place_N,
    )
