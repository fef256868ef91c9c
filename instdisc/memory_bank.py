"""The sharded memory bank: one unit-length feature per image, owned in contiguous shards by the ranks.

Rank r of W owns rows [N*r//W, N*(r+1)//W) and nothing else. Rows travel by all-gather: every rank knows which rows
are wanted, each gives those that it owns, and all receive them all; one step moves O(G*D + K*D) numbers, whatever N.

Reading rule: what step t reads is the bank as the updates up to t-1 left it. Owners copy rows out (`index_select`)
before anything is sent, so a later update cannot reach a fetch that is under way.

Shapes: N rows of the data set, R rows owned by this rank, D feature numbers, B samples of this rank, G of all ranks,
K negatives, M rows wanted, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.collectives import (
    Group,
    PendingRows,
    all_gather_rows,
    gather_counts,
    rank,
    start_all_gather_rows,
    world_size,
)
from dataloading.philox import Purpose
from instdisc.negatives import negative_indices

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
START_BLOCK_ROWS = 4096
NEVER = -1


def shard_bounds(num_rows: int, size: int) -> np.ndarray:
    """Return the W+1 bounds of the shards: rank r owns rows [bounds[r], bounds[r+1])."""
    return np.array([num_rows * r // size for r in range(size + 1)], dtype=np.int64)


def start_rows(num_rows: int, dim: int, seed: int, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of the bank before training: random directions of unit length, float32 (R, D).

    Drawn in blocks of 4,096 rows keyed by (seed, block), so they do not depend on who owns them.
    """
    rows_RD = np.empty((stop - start, dim), dtype=np.float32)
    for block in range(start // START_BLOCK_ROWS, -(-stop // START_BLOCK_ROWS)):
        first = block * START_BLOCK_ROWS
        bits = np.random.Philox(key=[seed, int(Purpose.BANK_START) << 48 | block])
        block_rows = np.random.Generator(bits).standard_normal((START_BLOCK_ROWS, dim), dtype=np.float32)
        low, high = max(start, first), min(stop, first + START_BLOCK_ROWS)
        rows_RD[low - start : high - start] = block_rows[low - first : high - first]
    return F.normalize(torch.from_numpy(rows_RD), dim=1)


@dataclass
class PendingLookup:
    """Rows on their way to every rank; `wait` returns them in the order in which they were asked for."""

    _pending: PendingRows
    _places_M: Tensor | None
    """Where each row stands among the gathered ones, which come in the order of their owners; None: as asked for."""

    def wait(self) -> Tensor:
        """Return the rows, float32 (M, D)."""
        gathered_MD = self._pending.wait()
        if self._places_M is not None:
            gathered_MD = gathered_MD.index_select(0, self._places_M.to(gathered_MD.device, non_blocking=True))
        return gathered_MD.float()


@dataclass(frozen=True)
class GlobalBatch:
    """What is known on every rank of the samples that all ranks bring together to a step, in rank order."""

    indices_G: Tensor
    """int64, on the CPU."""
    valid_G: Tensor
    """bool, on the CPU."""
    counts_W: Sequence[int]

    @cached_property
    def num_valid(self) -> int:
        """How many samples count."""
        return int(self.valid_G.sum())


@dataclass
class PendingUpdate:
    """Features on their way to the owners of their rows; `finish` writes the rows."""

    _bank: ShardedMemoryBank
    _batch: GlobalBatch
    _features: PendingRows
    _step: int

    def finish(self) -> None:
        """Write the rows that this rank owns."""
        self._bank.write(self._batch, self._features.wait(), self._step)


class ShardedMemoryBank:
    """One unit-length row of `dim` numbers per image, sharded over the ranks of `group`.

    num_rows: N. momentum: weight of the OLD row in an update (arXiv 1805.01978's released code: 0.5). dtype: storage,
    float32, float16 or bfloat16; arithmetic is float32. seed: of the starting rows and of the negatives. group: the
    process group of the bank's collectives, best one of its own.

    Attributes: `start`, `stop` (the rows owned), `rows` (R, D) in `dtype`, `last_step` int32 (R,), the step of each
    row's last write, -1 where there was none.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        group: Group = None,
    ) -> None:
        if num_rows < 1 or dim < 1:
            raise ValueError(f"memory bank: found {num_rows} rows of {dim} numbers, expected at least 1 of each")
        if not 0 <= momentum < 1:
            raise ValueError(
                f"memory bank momentum: found {momentum}, expected 0 <= momentum < 1 (weight of the OLD row)"
            )
        if dtype not in DTYPES.values():
            raise ValueError(f"memory bank dtype: found {dtype}, expected one of {', '.join(DTYPES)}")
        self.num_rows, self.dim, self.momentum, self.seed, self.group = num_rows, dim, momentum, seed, group
        self._bounds = shard_bounds(num_rows, world_size(group))
        self._rank = rank(group)
        self.start, self.stop = int(self._bounds[self._rank]), int(self._bounds[self._rank + 1])
        self.rows = start_rows(num_rows, dim, seed, self.start, self.stop).to(device=device, dtype=dtype)
        self.last_step = torch.full((self.stop - self.start,), NEVER, dtype=torch.int32, device=device)
        self.non_finite_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.rows.device

    def start_lookup(self, indices_M: Tensor) -> PendingLookup:
        """Start fetching rows to every rank. Collective: every rank asks for the same int64 (M,) CPU indices."""
        self._check_indices(indices_M)
        if len(self._bounds) == 2:
            own_MD = self.rows.index_select(0, indices_M.to(self.device, non_blocking=True))
            return PendingLookup(start_all_gather_rows(own_MD, [len(indices_M)], self.group), None)
        owners_M = np.searchsorted(self._bounds, indices_M.numpy(), side="right") - 1
        order_M = np.argsort(owners_M, kind="stable")
        places_M = np.empty_like(order_M)
        places_M[order_M] = np.arange(len(order_M))
        counts_W = np.bincount(owners_M, minlength=len(self._bounds) - 1).tolist()
        own_X = indices_M[torch.from_numpy(owners_M == self._rank)] - self.start
        rows_XD = self.rows.index_select(0, own_X.to(self.device, non_blocking=True))
        return PendingLookup(start_all_gather_rows(rows_XD, counts_W, self.group), torch.from_numpy(places_M))

    def lookup(self, indices_B: Tensor, *, counts_W: Sequence[int] | None = None) -> Tensor:
        """Return the rows of this rank's batch, float32 (B, D). Collective; ranks may bring different indices and B.

        indices_B: int64, on the CPU. counts_W: B of every rank, where the caller knows it.
        """
        counts_W = counts_W or gather_counts(len(indices_B), self.group)
        indices_G = all_gather_rows(indices_B, counts_W, self.group)
        first = sum(counts_W[: self._rank])
        return self.start_lookup(indices_G).wait()[first : first + len(indices_B)]

    def gather_negatives(self, step: int, num_negatives: int) -> tuple[Tensor, Tensor]:
        """Return the negatives of a step and their rows: float32 (K, D) and int64 (K,) on the CPU. Collective.

        The same on every rank: drawn from (seed, step), uniformly over N with replacement, and all-gathered.
        """
        indices_K = negative_indices(self.seed, step, num_negatives, self.num_rows)
        return self.start_lookup(indices_K).wait(), indices_K

    def update(self, indices_B: Tensor, features_BD: Tensor, step: int, valid_B: Tensor | None = None) -> None:
        """Write v <- normalise(momentum * v_old + (1 - momentum) * f) for the samples of all ranks. Collective.

        indices_B: int64, valid_B: bool, both on the CPU; features_BD: unit length. Every rank writes the rows that it
        owns. Samples with valid False are not written. A row that stands twice in the global batch gets the later
        one. Rows of features that are not finite keep their old value; `non_finite_step` remembers the first step in
        which this rank brought such features, and the caller reads it when it reads its metrics. Raises ValueError on
        shapes or indices that do not fit.
        """
        if len(features_BD) != len(indices_B):
            raise ValueError(
                f"memory bank update at step {step} on rank {self._rank}: found {len(features_BD)} features for "
                f"{len(indices_B)} indices, expected as many"
            )
        self._check_indices(indices_B)
        valid_B = torch.ones(len(indices_B), dtype=torch.bool) if valid_B is None else valid_B
        counts_W = gather_counts(len(indices_B), self.group)
        # One number carries the index and, in its sign, whether the sample counts.
        coded_G = all_gather_rows(torch.where(valid_B, indices_B, -1 - indices_B), counts_W, self.group)
        valid_G = coded_G >= 0
        batch = GlobalBatch(torch.where(valid_G, coded_G, -1 - coded_G), valid_G, counts_W)
        self.start_update(batch, features_BD, step).finish()

    @torch.no_grad()
    def start_update(self, batch: GlobalBatch, features_BD: Tensor, step: int) -> PendingUpdate:
        """Start an `update` of samples that every rank knows; rows change when it is finished. Collective."""
        expected = (batch.counts_W[self._rank], self.dim)
        if features_BD.shape != expected:
            raise ValueError(
                f"memory bank update at step {step} on rank {self._rank}: found features of shape "
                f"{tuple(features_BD.shape)}, expected {expected}"
            )
        bad = ~features_BD.isfinite().all()
        self.non_finite_step = torch.where(bad & (self.non_finite_step == NEVER), step, self.non_finite_step)
        features = start_all_gather_rows(features_BD.detach().float(), batch.counts_W, self.group)
        return PendingUpdate(self, batch, features, step)

    @torch.no_grad()
    def write(self, batch: GlobalBatch, features_GD: Tensor, step: int) -> None:
        """Write the rows of the batch that this rank owns, as `update` says, from the features of all ranks."""
        places = _last_places(batch, self.start, self.stop)
        local_U = (batch.indices_G[places] - self.start).to(self.device, non_blocking=True)
        new_UD = features_GD.index_select(0, places.to(self.device, non_blocking=True))
        stored_UD = self.rows.index_select(0, local_U)
        mixed_UD = F.normalize(self.momentum * stored_UD.float() + (1 - self.momentum) * new_UD, dim=1)
        finite_U = new_UD.isfinite().all(dim=1)
        self.rows.index_copy_(0, local_U, torch.where(finite_U[:, None], mixed_UD.to(self.rows.dtype), stored_UD))
        old_U = self.last_step.index_select(0, local_U)
        self.last_step.index_copy_(0, local_U, torch.where(finite_U, torch.full_like(old_U, step), old_U))

    def _check_indices(self, indices_M: Tensor) -> None:
        if len(indices_M) and not (int(indices_M.min()) >= 0 and int(indices_M.max()) < self.num_rows):
            raise ValueError(
                f"memory bank on rank {self._rank}: found indices from {int(indices_M.min())} to "
                f"{int(indices_M.max())}, expected 0 to {self.num_rows - 1}"
            )


def _last_places(batch: GlobalBatch, start: int, stop: int) -> Tensor:
    """Return, for each row of [start, stop) that is written, the place in the global batch of its last valid sample."""
    indices_G = batch.indices_G.numpy()
    places = np.flatnonzero((indices_G >= start) & (indices_G < stop) & batch.valid_G.numpy())
    # np.unique names the first place of each value: of the reversed sequence, that is the last.
    _, from_behind = np.unique(indices_G[places][::-1], return_index=True)
    return torch.from_numpy(places[::-1][from_behind])
