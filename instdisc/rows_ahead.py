"""The bank's rows of a step, fetched while the steps before it still run.

Which rows a step reads depends on indices only: its samples', known from the stream, and its negatives', drawn from
(seed, step). So their fetch starts one step or more ahead, and travels behind decoding, forward and backward pass. The
updates of the steps in between reach the copies here, by the owners' own arithmetic: every rank holds the indices and
features of each global batch. What a step reads is therefore to the bit what a fetch after the last update would bring.

Features travel the same way: an update is written when the next rows are read, which gives it the time from one forward
pass to the next.

Shapes: G samples of all ranks, K negatives, M = G + K rows wanted, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instdisc.bank_update import PendingUpdate, Update
from instdisc.memory_bank import PendingLookup, ShardedMemoryBank
from instdisc.negatives import negative_indices


@dataclass(frozen=True)
class FetchedRows:
    """The rows that a step reads, float32, as the step before left them, and their row numbers on the CPU."""

    positives_GD: Tensor
    negatives_KD: Tensor
    indices_G: Tensor
    indices_K: Tensor


@dataclass(frozen=True)
class _Fetch:
    """Rows on their way. since: the first step whose update they lack."""

    lookup: PendingLookup
    indices_M: Tensor
    since: int


class RowsAhead:
    """Fetches the rows of coming steps and keeps them current.

    rows_of_step: the G dataset rows of a global step, int64, asked for in rising order of steps. num_negatives: K, may
    be 0. ahead: steps between the start of a fetch and the step that reads it; 0 fetches when the rows are read. All
    ranks call the methods in the same order with the same steps.
    """

    def __init__(
        self,
        bank: ShardedMemoryBank,
        rows_of_step: Callable[[int], np.ndarray],
        *,
        global_batch: int,
        num_negatives: int,
        negatives_seed: int,
        ahead: int,
    ) -> None:
        self._bank, self._rows_of_step, self._global_batch = bank, rows_of_step, global_batch
        self._num_negatives, self._negatives_seed, self._ahead = num_negatives, negatives_seed, ahead
        self._fetches: dict[int, _Fetch] = {}
        self._wanted: dict[int, Tensor] = {}
        self._next_unwritten: int | None = None
        self._pending: PendingUpdate | None = None
        self._written: list[Update] = []

    def start(self, step: int) -> None:
        """Start what is not on its way of the fetches up to `ahead` steps after `step`. Collective."""
        if self._next_unwritten is None:
            self._next_unwritten = step
        if self._ahead == 0:
            return
        for coming in range(step, step + self._ahead + 1):
            if coming not in self._fetches:
                self._start_fetch(coming)
        if self._bank.is_mapped:
            self._bank.read_ahead(self._rows_wanted(step + self._ahead + 1).numpy())

    def take(self, step: int) -> FetchedRows:
        """Return the rows that `step` reads. Waits for them, and for the features of the step before. Collective."""
        self.settle()
        if step not in self._fetches:
            self._start_fetch(step)
        fetch = self._fetches.pop(step)
        rows_MD, indices_M = fetch.lookup.wait(), fetch.indices_M
        for update in self._written:
            if update.step >= fetch.since:
                update.bring_up_to_date(rows_MD, indices_M.numpy(), self._bank.rows.dtype)
        at = self._global_batch
        return FetchedRows(rows_MD[:at], rows_MD[at:], indices_M[:at], indices_M[at:])

    def will_write(self, update: PendingUpdate) -> None:
        """Take over the update of a step: it is written before the next rows are taken."""
        assert self._pending is None, "the update of the step before is written by now"
        self._pending = update

    def settle(self) -> None:
        """Write the update that is on its way; afterwards the bank is as the last step left it. Waits for features."""
        if self._pending is None:
            return
        update = self._pending.wait()
        self._pending = None
        self._bank.write(update)
        self._next_unwritten = update.step + 1
        self._written = [u for u in [*self._written, update] if self._is_lacked(u)]

    def _start_fetch(self, step: int) -> None:
        assert self._next_unwritten is not None, "start comes first"
        wanted_M = self._rows_wanted(step)
        del self._wanted[step]
        self._fetches[step] = _Fetch(self._bank.start_lookup(wanted_M), wanted_M, self._next_unwritten)

    def _rows_wanted(self, step: int) -> Tensor:
        """Return the rows that a step wants, int64 (M,); drawn once."""
        if step not in self._wanted:
            drawn_K = negative_indices(self._negatives_seed, step, self._num_negatives, self._bank.num_rows)
            self._wanted[step] = torch.cat([torch.from_numpy(self._rows_of_step(step)), drawn_K])
        return self._wanted[step]

    def _is_lacked(self, update: Update) -> bool:
        """Whether rows that are on their way were copied before an update."""
        return any(update.step >= fetch.since for fetch in self._fetches.values())
