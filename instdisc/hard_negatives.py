"""Hard negatives: the rows of the bank that are nearest to a sample's feature, its own row left out.

They are what the exact softmax weighs most among all N rows (arXiv 2010.01028 takes them from a queue). Found exactly,
by a pass over the whole bank: G x N/W x D multiplications on each rank.

Shapes: G samples of all ranks, H hard negatives of a sample, R rows of this rank, C rows of one block, D feature
numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import all_gather_rows, rank
from dataloading.device_copies import to_device
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.objectives.owners import OwnedPairs

BLOCK_SCORES = 2**20


@torch.no_grad()
def nearest_owned(features_GD: Tensor, indices_G: Tensor, bank: ShardedMemoryBank, num_hard: int) -> OwnedPairs:
    """Return which rows of this rank are among the `num_hard` of the whole bank that are nearest to each feature.

    features_GD, indices_G: the features of all ranks and their own rows (on the CPU). Of rows that are as near as the
    last of them, copies of each other, only so many count: their number does not depend on the number of ranks.
    Collective.
    """
    scores_GH, places_GH = _nearest_here(features_GD, indices_G, bank, num_hard)
    # A rank knows its own best; which of them are among the best of all, all ranks find from the same scores.
    gathered = all_gather_rows(scores_GH.T.contiguous(), [num_hard] * bank.world_size, bank.group)
    best_GH = torch.sort(gathered.T, dim=1, descending=True, stable=True).indices[:, :num_hard]
    is_best_GX = torch.zeros_like(gathered.T, dtype=torch.bool).scatter_(1, best_GH, True)
    first = rank(bank.group) * num_hard
    chosen_GH = (is_best_GX[:, first : first + num_hard] & (scores_GH > -torch.inf)).cpu().numpy()
    return OwnedPairs(places_GH.cpu().numpy()[chosen_GH], chosen_GH.sum(axis=1).astype(np.int64))


def _nearest_here(
    features_GD: Tensor, indices_G: Tensor, bank: ShardedMemoryBank, num_hard: int
) -> tuple[Tensor, Tensor]:
    """Return cosines and places in the shard of the nearest owned rows, (G, H); -inf where there are fewer."""
    num_samples, device = len(features_GD), features_GD.device
    best_GH = features_GD.new_full((num_samples, num_hard), -torch.inf)
    places_GH = torch.zeros((num_samples, num_hard), dtype=torch.int64, device=device)
    own_G = to_device(indices_G - bank.start, device)
    block_rows = max(num_hard, BLOCK_SCORES // max(num_samples, bank.dim))
    for start in range(0, len(bank.rows), block_rows):
        block_CD = to_device(bank.rows[start : start + block_rows], device).float()
        scores_GC = features_GD @ block_CD.T
        is_own_GC = own_G[:, None] == torch.arange(start, start + len(block_CD), device=device)
        scores_GC.masked_fill_(is_own_GC, -torch.inf)
        both = torch.cat([best_GH, scores_GC], dim=1)
        places_GC = torch.arange(start, start + len(block_CD), device=device).expand(num_samples, -1)
        best_GH, chosen = torch.topk(both, num_hard, dim=1)
        places_GH = torch.cat([places_GH, places_GC], dim=1).gather(1, chosen)
    return best_GH, places_GH
