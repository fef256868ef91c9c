"""What one step writes into the memory bank, as every rank sees it, and the arithmetic of a row's update.

Owners write rows, and ranks that fetched rows before they were written bring their copies up to date. Both call
`Update.applied_to`, whose result for a row does not depend on which rows stand beside it, so the copies have the
owner's bits.

Shapes: G samples of all ranks, M rows wanted, U rows written, D feature numbers, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import PendingRows
from dataloading.device_copies import to_device

SAME_FEATURES = 1e-6
"""Features that differ by less in every number are the same."""
MIN_DISTINCT = 4
"""Fewer images than this may well be copies of each other."""


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

    @cached_property
    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that the batch writes, in rising order, and the place of each one's last valid sample in G."""
        places = np.flatnonzero(self.valid_G.numpy())
        # np.unique names the first place of each value: of the reversed sequence, that is the last.
        rows, from_behind = np.unique(self.indices_G.numpy()[places][::-1], return_index=True)
        return rows, places[::-1][from_behind]

    def rank_of(self, place: int) -> int:
        """Return the rank that brought the sample at a place in G."""
        return int(np.searchsorted(np.cumsum(self.counts_W), place, side="right"))


@dataclass(frozen=True)
class Update:
    """An update whose features have arrived."""

    batch: GlobalBatch
    features_GD: Tensor
    """float32, on the device that computes."""
    step: int
    momentum: float

    @cached_property
    def finite_G(self) -> Tensor:
        """Whether all numbers of a feature are finite (else their sum is not), bool on the features' device."""
        return self.features_GD.sum(dim=1).isfinite()

    def are_finite_of(self, rank: int) -> Tensor:
        """Return whether all valid features that a rank brought are finite, bool scalar on the features' device."""
        first = sum(self.batch.counts_W[:rank])
        own = slice(first, first + self.batch.counts_W[rank])
        return (self.finite_G[own] | ~to_device(self.batch.valid_G[own], self.features_GD.device)).all()

    @cached_property
    def all_same(self) -> Tensor:
        """Whether the features of four or more different images are one and the same, bool scalar on their device.

        Such a batch teaches nothing and would make its rows alike for ever.
        """
        rows, places = self.batch.written
        if len(rows) < MIN_DISTINCT:
            return torch.zeros((), dtype=torch.bool, device=self.features_GD.device)
        valid_UD = self.features_GD.index_select(0, to_device(torch.from_numpy(places), self.features_GD.device))
        return (valid_UD.amax(dim=0) - valid_UD.amin(dim=0)).amax() <= SAME_FEATURES

    def applied_to(self, stored_UD: Tensor, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return stored rows as this update leaves them, in their own dtype, and whether it changes them, bool (U,).

        Both on the rows' device. places: of each row's sample in G. Rows stay as they are where the feature is not
        finite, and all of them where all features are the same.
        """
        at = to_device(torch.from_numpy(places), self.features_GD.device)
        features_UD = to_device(self.features_GD.index_select(0, at), stored_UD.device)
        mixed_UD, lengths_U1 = _mixed(stored_UD, features_UD, self.momentum)
        accepted_U = to_device(self.finite_G.index_select(0, at) & ~self.all_same, stored_UD.device)
        # Huge features, or one opposite to its row, leave nothing that could be scaled to length 1.
        accepted_U &= (lengths_U1[:, 0] > 0) & lengths_U1[:, 0].isfinite()
        mixed_UD = (mixed_UD / lengths_U1).to(stored_UD.dtype)
        return torch.where(accepted_U[:, None], mixed_UD, stored_UD), accepted_U

    def bring_up_to_date(self, rows_MD: Tensor, indices_M: np.ndarray, dtype: torch.dtype) -> None:
        """Change copies of rows, float32 (M, D), that were read before this update, as their owners change the rows.

        dtype: that of the bank's storage, to which an update rounds.
        """
        rows, places = self.batch.written
        if len(rows) == 0:
            return
        found = np.minimum(np.searchsorted(rows, indices_M), len(rows) - 1)
        hits = np.flatnonzero(rows[found] == indices_M)
        if len(hits) == 0:
            return
        at = to_device(torch.from_numpy(hits), rows_MD.device)
        stored_UD = rows_MD.index_select(0, at).to(dtype)
        current_UD, _ = self.applied_to(stored_UD, places[found[hits]])
        rows_MD.index_copy_(0, at, current_UD.float())


@dataclass(frozen=True)
class PendingUpdate:
    """Features and validity of a step on their way to all ranks."""

    indices_G: Tensor
    counts_W: Sequence[int]
    validity: PendingRows
    features: PendingRows
    step: int
    momentum: float

    @cached_property
    def batch(self) -> GlobalBatch:
        """The batch, once its validity is known. Waits for it."""
        return GlobalBatch(self.indices_G, self.validity.wait(), self.counts_W)

    def wait(self) -> Update:
        """Return the update, once its features are here."""
        return Update(self.batch, self.features.wait(), self.step, self.momentum)


def _mixed(stored_UD: Tensor, features_UD: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Return momentum * stored + (1 - momentum) * feature, float32, and its length, (U, 1), by which it is divided.

    arXiv 1805.01978, section 3.1, and its released code: the momentum multiplies the OLD row. The bits of a row depend
    on that row alone: the squares are added by halves with elementwise sums, because a library's reduction may choose
    its order by the number of rows, and then a copy of a row that is updated elsewhere would differ in its last bits.
    """
    mixed_UD = momentum * stored_UD.float() + (1 - momentum) * features_UD
    squares_UD = mixed_UD * mixed_UD
    width = squares_UD.shape[1]
    while width > 1:
        half = (width + 1) // 2
        squares_UD[:, : width - half] += squares_UD[:, half:width]
        width = half
    return mixed_UD, squares_UD[:, :1].sqrt()
