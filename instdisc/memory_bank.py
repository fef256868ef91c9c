"""The sharded memory bank: one unit-length feature per image, owned in contiguous shards by the ranks.

Rank r of W owns rows [N*r//W, N*(r+1)//W) and nothing else. Rows travel by all-gather: every rank knows which rows
are wanted, each gives those that it owns, and all receive them all; one step moves O(G*D + K*D) numbers, whatever N.

Reading rule: what step t reads is the bank as the updates up to t-1 left it. Owners copy rows out (`index_select`)
before anything is sent, so a later update cannot reach a fetch that is under way; whoever fetches earlier brings the
copies up to date itself (`instdisc.rows_ahead`).

Shapes: N rows of the data set, R rows owned by this rank, D feature numbers, B samples of this rank, G of all ranks,
K negatives, M rows wanted, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
from cluster.row_guard import RowGuard
from dataloading.device_copies import host_memory, to_device
from instdisc.bank_storage import allocate, fill_with_start_rows
from instdisc.bank_update import PendingUpdate, Update
from instdisc.negatives import negative_indices

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NEVER = -1


def shard_bounds(num_rows: int, size: int) -> np.ndarray:
    """Return the W+1 bounds of the shards: rank r owns rows [bounds[r], bounds[r+1])."""
    return np.array([num_rows * r // size for r in range(size + 1)], dtype=np.int64)


@dataclass
class PendingLookup:
    """Rows on their way to every rank; `wait` returns them in the order in which they were asked for."""

    _pending: PendingRows
    _places_M: Tensor | None
    """Where each row stands among the gathered ones, which come in the order of their owners; None: as asked for."""

    def wait(self) -> Tensor:
        """Return the rows, float32 (M, D), in memory that nobody else has."""
        gathered_MD = self._pending.wait()
        if self._places_M is not None:
            gathered_MD = gathered_MD.index_select(0, to_device(self._places_M, gathered_MD.device))
        return gathered_MD.float()


class ShardedMemoryBank:
    """One unit-length row of `dim` numbers per image, sharded over the ranks of `group`.

    num_rows: N. momentum: weight of the OLD row in an update (arXiv 1805.01978's released code: 0.5). dtype: storage,
    float32, float16 or bfloat16; arithmetic is float32. device: where the rows are kept. seed: of the starting rows and
    of the negatives. group: the process group of the bank's collectives, best one of its own. work_device: where rows
    are fetched to and features come from (default: `device`); host memory is page-locked for a GPU. mapped_dir: keep
    the rows in a nameless file in this folder, mapped into host memory.

    Attributes: `start`, `stop` (the rows owned), `rows` (R, D) in `dtype`, `last_step` int32 (R,), the step of each
    row's last write, -1 where there was none, `num_written` (owned rows that were written, an int64 scalar). Raises
    ValueError for arguments that cannot be, OSError where a mapped file cannot be made.
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
        work_device: torch.device | str | None = None,
        mapped_dir: str | None = None,
    ) -> None:
        device = _with_index(device)
        self.work_device = device if work_device is None else _with_index(work_device)
        _check_arguments(num_rows, dim, momentum, dtype, device, mapped_dir)
        self.num_rows, self.dim, self.momentum, self.seed, self.group = num_rows, dim, momentum, seed, group
        self._bounds = shard_bounds(num_rows, world_size(group))
        self._rank = rank(group)
        self.start, self.stop = int(self._bounds[self._rank]), int(self._bounds[self._rank + 1])
        pinned = device.type == "cpu" and self.work_device.type == "cuda"
        self._shard = allocate(self.stop - self.start, dim, dtype, device, pinned=pinned, folder=mapped_dir)
        self.rows = self._shard.rows
        fill_with_start_rows(self.rows, seed, self.start)
        self.last_step = torch.full((self.stop - self.start,), NEVER, dtype=torch.int32, device=device)
        self.guard = RowGuard()
        """Held while rows are written, so that a checkpoint can be read meanwhile."""
        self.num_written = torch.zeros((), dtype=torch.int64, device=device)
        self.non_finite_step = torch.full((), NEVER, dtype=torch.int64, device=self.work_device)
        self.all_same_step = torch.full((), NEVER, dtype=torch.int64, device=self.work_device)

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.rows.device

    @property
    def world_size(self) -> int:
        """W."""
        return len(self._bounds) - 1

    @property
    def is_mapped(self) -> bool:
        """Whether the rows lie in a mapped file."""
        return self._shard.mapping is not None

    def read_ahead(self, indices_M: np.ndarray) -> None:
        """Bring owned rows that will be looked up soon from disk, if the bank is mapped; does not wait for them."""
        own = indices_M[(indices_M >= self.start) & (indices_M < self.stop)]
        self._shard.read_ahead(own - self.start)

    def start_lookup(self, indices_M: Tensor) -> PendingLookup:
        """Start fetching rows to every rank. Collective: every rank asks for the same int64 (M,) CPU indices."""
        self._check_indices(indices_M)
        if self.world_size == 1:
            return PendingLookup(start_all_gather_rows(self._copied(indices_M), [len(indices_M)], self.group), None)
        owners_M = np.searchsorted(self._bounds, indices_M.numpy(), side="right") - 1
        order_M = np.argsort(owners_M, kind="stable")
        places_M = np.empty_like(order_M)
        places_M[order_M] = np.arange(len(order_M))
        counts_W = np.bincount(owners_M, minlength=self.world_size).tolist()
        own_X = indices_M[torch.from_numpy(owners_M == self._rank)] - self.start
        return PendingLookup(
            start_all_gather_rows(self._copied(own_X), counts_W, self.group), torch.from_numpy(places_M)
        )

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
        owns. Samples with valid False are not written. A row that stands twice in the global batch gets the later one.

        Raises ValueError on every rank, naming step and rank, and writes nothing, where a rank brought shapes or
        indices that do not fit or features that are not finite, or where the features of four and more different
        images are all the same. Waits for the device; training uses `start_update`, which does not.
        """
        valid_B = torch.ones(len(indices_B), dtype=torch.bool) if valid_B is None else valid_B
        counts_W = self._agree_on_shapes(indices_B, features_BD, valid_B, step)
        # One number carries the index and, in its sign, whether the sample counts.
        coded_G = all_gather_rows(torch.where(valid_B, indices_B, -1 - indices_B), counts_W, self.group)
        valid_G = coded_G >= 0
        indices_G = torch.where(valid_G, coded_G, -1 - coded_G)
        validity = PendingRows(valid_G[None], [len(valid_G)], None)
        update = self.start_update(indices_G, counts_W, validity, features_BD, step).wait()
        self._refuse_useless(update)
        self.write(update)

    @torch.no_grad()
    def start_update(
        self,
        indices_G: Tensor,
        counts_W: Sequence[int],
        validity: PendingRows,
        features_BD: Tensor,
        step: int,
        momentum: float | None = None,
    ) -> PendingUpdate:
        """Start an update of samples whose rows every rank knows; `write` changes rows, when it is asked to.
        Collective.

        indices_G: int64, on the CPU, in rank order. validity: their validity on its way, on the CPU. momentum: of this
        step, where it is not always the same. Nothing here or in `write` waits for the device on the host, unless the
        rows lie in another memory than the features.
        """
        expected = (counts_W[self._rank], self.dim)
        if features_BD.shape != expected:
            raise ValueError(
                f"memory bank update at step {step} on rank {self._rank}: found features of shape "
                f"{tuple(features_BD.shape)}, expected {expected}"
            )
        features = start_all_gather_rows(features_BD.detach().float(), counts_W, self.group)
        momentum = self.momentum if momentum is None else momentum
        return PendingUpdate(indices_G, counts_W, validity, features, step, momentum)

    @torch.no_grad()
    def write(self, update: Update) -> None:
        """Write the rows that this rank owns. Rows whose feature is not finite keep their value, and all of them do
        where all features are the same; `non_finite_step` (of this rank's features) and `all_same_step` remember the
        first such step (-1: none).
        """
        bad = ~update.are_finite_of(self._rank)
        self.non_finite_step = torch.where(bad & (self.non_finite_step == NEVER), update.step, self.non_finite_step)
        same = update.all_same
        self.all_same_step = torch.where(same & (self.all_same_step == NEVER), update.step, self.all_same_step)
        rows, places = update.batch.written
        low, high = np.searchsorted(rows, (self.start, self.stop))
        local_U = to_device(torch.from_numpy(rows[low:high] - self.start), self.device)
        written_UD, accepted_U = update.applied_to(self.rows.index_select(0, local_U), places[low:high])
        old_U = self.last_step.index_select(0, local_U)
        with self.guard.writing(rows[low:high] - self.start):
            self.rows.index_copy_(0, local_U, written_UD)
            self.last_step.index_copy_(0, local_U, torch.where(accepted_U, torch.full_like(old_U, update.step), old_U))
        self.num_written += (accepted_U & (old_U == NEVER)).sum()

    @torch.no_grad()
    def recount_written(self) -> None:
        """Count the written rows anew, after `rows` and `last_step` were filled from a checkpoint."""
        self.num_written.copy_((self.last_step != NEVER).sum())

    def _copied(self, own_X: Tensor) -> Tensor:
        """Return copies of owned rows, (X, D) in the bank's dtype, where they are worked with."""
        if self.work_device == self.device:
            return self.rows.index_select(0, to_device(own_X, self.device))
        rows_XD = host_memory(torch.Size((len(own_X), self.dim)), self.rows.dtype, self.work_device)
        return to_device(torch.index_select(self.rows, 0, own_X, out=rows_XD), self.work_device)

    def _agree_on_shapes(self, indices_B: Tensor, features_BD: Tensor, valid_B: Tensor, step: int) -> list[int]:
        """Return how many samples each rank brings; raise ValueError on all ranks where those of one do not fit."""
        width = features_BD.shape[1] if features_BD.dim() == 2 else -1
        low, high = (int(indices_B.min()), int(indices_B.max())) if len(indices_B) else (0, 0)
        typed = (indices_B.dtype, valid_B.dtype) == (torch.int64, torch.bool)
        facts = torch.tensor([[len(indices_B), len(features_BD), width, len(valid_B), low, high, typed]])
        found_W7 = all_gather_rows(facts, [1] * self.world_size, self.group).tolist()
        for number, (count, features, width, valid, low, high, typed) in enumerate(found_W7):
            where = f"memory bank update at step {step}: rank {number} brought"
            if not typed:
                raise ValueError(
                    f"{where} indices that are not int64 or flags that are not bool, which the other ranks cannot "
                    "receive; nothing was written"
                )
            if (features, width, valid) != (count, self.dim, count):
                raise ValueError(
                    f"{where} features of shape ({features}, {width}) and {valid} flags for {count} indices, expected "
                    f"({count}, {self.dim}) and {count} flags; nothing was written"
                )
            if not 0 <= low <= high < self.num_rows:
                raise ValueError(
                    f"{where} indices from {low} to {high}, expected 0 to {self.num_rows - 1}; nothing was written"
                )
        return [count for count, *_ in found_W7]

    def _refuse_useless(self, update: Update) -> None:
        where = f"memory bank update at step {update.step}"
        bad = (~update.finite_G.cpu() & update.batch.valid_G).nonzero().flatten().tolist()
        if bad:
            batch = update.batch
            raise ValueError(
                f"{where}: rank {batch.rank_of(bad[0])} brought a feature that is not finite for row "
                f"{int(batch.indices_G[bad[0]])} ({len(bad)} such in the batch), expected finite numbers; nothing was "
                "written. A lower learning rate or float32 usually helps"
            )
        if bool(update.all_same):
            rows, places = update.batch.written
            ranks = sorted({update.batch.rank_of(place) for place in places})
            raise ValueError(
                f"{where}: rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} brought one feature for all "
                f"{len(rows)} images of the batch, expected different ones; nothing was written. The encoder has "
                "collapsed, or its input is always the same"
            )

    def _check_indices(self, indices_M: Tensor) -> None:
        if len(indices_M) and not (int(indices_M.min()) >= 0 and int(indices_M.max()) < self.num_rows):
            raise ValueError(
                f"memory bank on rank {self._rank}: found indices from {int(indices_M.min())} to "
                f"{int(indices_M.max())}, expected 0 to {self.num_rows - 1}"
            )


def _with_index(device: torch.device | str) -> torch.device:
    """Return a device as tensors name it: "cuda" as "cuda:0", so that devices can be compared."""
    return torch.empty(0, device=device).device


def _check_arguments(
    num_rows: int, dim: int, momentum: float, dtype: torch.dtype, device: torch.device, mapped_dir: str | None
) -> None:
    if num_rows < 1 or dim < 1:
        raise ValueError(f"memory bank: found {num_rows} rows of {dim} numbers, expected at least 1 of each")
    if not 0 <= momentum < 1:
        raise ValueError(f"memory bank momentum: found {momentum}, expected 0 <= momentum < 1 (weight of the OLD row)")
    if dtype not in DTYPES.values():
        raise ValueError(f"memory bank dtype: found {dtype}, expected one of {', '.join(DTYPES)}")
    if mapped_dir is not None and device.type != "cpu":
        raise ValueError(f"memory bank in a mapped file: found device {device}, expected cpu")
