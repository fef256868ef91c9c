"""A named table of rows, of which every rank holds a contiguous part, and its bytes in storage.

Storage is raw little-endian rows in blocks of a fixed number of rows. Blocks begin at multiples of that number, so
that they do not depend on the number of workers; where a boundary between ranks cuts a block, each rank writes its
part of it.

Shapes: R rows of this rank, X bytes of a row; the rest of the shape is that of one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cluster.manifest import ITEM_BYTES, row_bytes

if TYPE_CHECKING:
    from cluster.row_guard import RowGuard

BLOCK_BYTES = 64 * 2**20
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}


@dataclass(frozen=True)
class RowTable:
    """Rows [start, start + R) of a table of `num_rows` rows.

    rows: (R, ...) on any device, dtype one of `DTYPES`, R may be 0. last_step: int32 (R,), the step in which each row
    was last written (-1: never); with it a save may store only the rows written since the save before. guard: of rows
    in host memory whose writes it hears of: a save then copies them while training goes on, else at once.
    Raises ValueError for anything else.
    """

    num_rows: int
    start: int
    rows: Tensor
    last_step: Tensor | None = None
    guard: RowGuard | None = None

    def __post_init__(self) -> None:
        if self.rows.dim() < 1 or self.dtype not in DTYPES or self.row_bytes == 0:
            raise ValueError(
                f"rows: found {tuple(self.rows.shape)} {self.dtype}, expected one or more dimensions, rows of at "
                f"least one number, and one of {', '.join(DTYPES)}"
            )
        if not 0 <= self.start <= self.stop <= self.num_rows:
            raise ValueError(f"rows [{self.start}, {self.stop}) of a table of {self.num_rows}: expected them inside it")
        last = self.last_step
        if last is not None and (last.dtype, tuple(last.shape)) != (torch.int32, (len(self.rows),)):
            raise ValueError(
                f"last_step: found {tuple(last.shape)} {last.dtype}, expected ({len(self.rows)},) torch.int32"
            )

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape[1:])

    @property
    def dtype(self) -> str:
        return str(self.rows.dtype).removeprefix("torch.")

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.row_shape, self.dtype)

    def segments(self, block_rows: int | None = None) -> list[tuple[int, int]]:
        """Return the row ranges [start, stop) in which these rows are stored, blocks of about 64 MiB by default."""
        return block_ranges(self.start, self.stop, block_rows or max(1, BLOCK_BYTES // self.row_bytes))


def block_ranges(start: int, stop: int, block_rows: int) -> list[tuple[int, int]]:
    """Cut [start, stop) at the multiples of `block_rows`."""
    first, last = start // block_rows, -(-stop // block_rows)
    if start >= stop:
        return []
    return [(max(start, b * block_rows), min(stop, (b + 1) * block_rows)) for b in range(first, last)]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a host tensor's bytes in row-major order; only a tensor that is not contiguous is copied."""
    # Through uint8, because numpy has no bfloat16.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def row_view(rows: Tensor) -> np.ndarray:
    """Return a host tensor's rows as bytes (R, X), without a copy. ValueError if they do not lie side by side."""
    if not rows.is_contiguous():
        raise ValueError(f"rows: found strides {rows.stride()}, expected rows that lie side by side in memory")
    if len(rows) == 0:
        return np.empty((0, math.prod(rows.shape[1:]) * rows.itemsize), np.uint8)
    return rows.detach().reshape(len(rows), -1).view(torch.uint8).numpy()
