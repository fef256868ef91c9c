"""What is saved of one step: frozen between two steps, written while training goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.document_kinds import check_json
from cluster.page_locked import page_locked
from cluster.row_guard import FrozenRows, RowGuard
from cluster.row_table import RowTable
from cluster.store import check_key


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A rank's part of a checkpoint as it was after `step`. seconds: that it took, while training waited.

    tensors: in host memory, None on ranks other than 0. state: JSON text.
    """

    step: int
    tables: Mapping[str, RowTable]
    frozen: Mapping[str, FrozenRows]
    tensors: Mapping[str, Tensor] | None
    state: str
    metrics: Mapping[str, float]
    seconds: float

    def release(self) -> None:
        """Free what was kept of rows."""
        for frozen in self.frozen.values():
            frozen.release()


class SnapshotTaker:
    """Takes one snapshot after the other; the memory for copies of tensors is used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(
        self,
        step: int,
        tables: Mapping[str, RowTable],
        tensors: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> Snapshot:
        """Freeze guarded tables in host memory, and copy everything else there. Called between two steps, in the thread
        that trains, when the snapshot before is released. ValueError for state that is not JSON and for odd names.
        """
        started_s = time.perf_counter()
        check_json(state, "state")
        text = json.dumps(state, allow_nan=False)
        for name in tables:
            _check_name(name)
        copies = None if tensors is None else {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        if copies is not None:
            self._buffers = dict(copies)
        frozen: dict[str, FrozenRows] = {}
        try:
            for name, table in tables.items():
                frozen[name] = self._freeze(table)
        except BaseException:
            # Or their owner would go on saving old values, for nobody.
            for rows in frozen.values():
                rows.release()
            raise
        if any(tensor.device.type == "cuda" for tensor in (tensors or {}).values()):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started_s
        return Snapshot(
            step=step, tables=dict(tables), frozen=frozen, tensors=copies, state=text, metrics=metrics, seconds=seconds
        )

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = _empty_on_host(tensor)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _freeze(self, table: RowTable) -> FrozenRows:
        if table.guard is not None and table.rows.device.type == "cpu":
            return table.guard.freeze(table.rows, table.last_step)
        last_step = None if table.last_step is None else _copied(table.last_step)
        return RowGuard().freeze(_copied(table.rows), last_step)


def _copied(tensor: Tensor) -> Tensor:
    return _empty_on_host(tensor).copy_(tensor.detach())


def _empty_on_host(tensor: Tensor) -> Tensor:
    """Return host memory for a tensor, page-locked where it comes from a GPU."""
    if tensor.device.type == "cuda":
        return page_locked(tensor.shape, tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _check_name(name: str) -> None:
    if "/" in name:
        raise ValueError(f"table {name!r}: expected a name without '/'")
    check_key(name)
