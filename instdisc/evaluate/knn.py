"""Weighted k-nearest-neighbour classification (arXiv 1805.01978, section 3.4), on one process or on a sharded gallery.

Shapes: B queries, N gallery rows, R gallery rows of this rank, C classes, k neighbours, D feature numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.collectives import Group, all_gather_rows, gather_counts

_BLOCK_SCORES = 2**24
_GALLERY_BLOCK = 2**16

_MAX_LOGIT = 690.0


def knn_classify(
    queries_BD: Tensor,
    gallery_ND: Tensor,
    labels_N: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    num_classes: int,
) -> Tensor:
    """Return the votes of the k nearest gallery rows, float64 (B, C): w_c = sum over neighbours of class c of exp(s/τ).

    queries_BD, gallery_ND: any length, compared by cosine. labels_N: int64. k is cut to N.
    """
    scores_Bk, indices_Bk = nearest(queries_BD, gallery_ND, k)
    return _votes(scores_Bk, labels_N.to(indices_Bk.device)[indices_Bk], temperature, num_classes)


def nearest(queries_BD: Tensor, gallery_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosines, float32 (B, k), and the gallery rows, int64 (B, k), of the k nearest, the nearest first."""
    queries_BD = F.normalize(queries_BD.float(), dim=1)
    k, device = min(k, len(gallery_ND)), queries_BD.device
    scores_Bk = queries_BD.new_full((len(queries_BD), k), -math.inf)
    indices_Bk = torch.zeros((len(queries_BD), k), dtype=torch.int64, device=device)
    for start in range(0, len(gallery_ND), _GALLERY_BLOCK):
        # A block at a time, so that rows of 16 bits or in another memory are never converted or copied as a whole.
        block_CD = F.normalize(gallery_ND[start : start + _GALLERY_BLOCK].to(device, torch.float32), dim=1)
        size = max(1, _BLOCK_SCORES // len(block_CD))
        for first in range(0, len(queries_BD), size):
            part = slice(first, first + size)
            both_bC = torch.cat([scores_Bk[part], queries_BD[part] @ block_CD.T], dim=1)
            scores_Bk[part], chosen_bk = torch.topk(both_bC, k, dim=1)
            # The first k places are those of the blocks before, the others those of this one.
            before_bk = indices_Bk[part].gather(1, chosen_bk.clamp(max=k - 1))
            indices_Bk[part] = torch.where(chosen_bk < k, before_bk, chosen_bk - k + start)
    return scores_Bk, indices_Bk


@dataclass(frozen=True)
class Neighbours:
    """The k nearest gallery rows of each query: cosines, row numbers of the whole gallery, and their labels."""

    scores_Bk: Tensor
    rows_Bk: Tensor
    labels_Bk: Tensor

    def votes(self, temperature: float, num_classes: int) -> Tensor:
        """Return the weighted votes, float64 (B, C)."""
        return _votes(self.scores_Bk, self.labels_Bk, temperature, num_classes)


def nearest_sharded(
    queries_BD: Tensor, gallery_RD: Tensor, labels_R: Tensor, start: int, k: int, group: Group = None
) -> Neighbours:
    """Return the neighbours of the same queries on every rank over a gallery whose rows [start, start+R) are here.

    Each rank finds its own k nearest and sends those, k*B numbers whatever the gallery's size. Collective.
    """
    scores_Bk, indices_Bk = nearest(queries_BD, gallery_RD, k)
    local = (scores_Bk.T, (indices_Bk + start).T, labels_R.to(indices_Bk.device)[indices_Bk].T)
    counts_W = gather_counts(local[0].shape[0], group)
    scores_BM, rows_BM, labels_BM = (all_gather_rows(part.contiguous(), counts_W, group).T for part in local)
    top = torch.topk(scores_BM, min(k, scores_BM.shape[1]), dim=1)
    return Neighbours(top.values, rows_BM.gather(1, top.indices), labels_BM.gather(1, top.indices))


def top1(votes_BC: Tensor, labels_B: Tensor) -> float:
    """Return the share of queries whose strongest vote is their label, in percent."""
    return 100.0 * (votes_BC.argmax(dim=1) == labels_B.to(votes_BC.device)).double().mean().item()


def _votes(scores_Bk: Tensor, labels_Bk: Tensor, temperature: float, num_classes: int) -> Tensor:
    votes_BC = torch.zeros((len(scores_Bk), num_classes), dtype=torch.float64, device=scores_Bk.device)
    logits_Bk = scores_Bk.double() / temperature
    # exp overflows float64 above 709; a factor for each query changes no order among its classes.
    too_much_B1 = (logits_Bk.amax(dim=1, keepdim=True) - _MAX_LOGIT).clamp(min=0)
    return votes_BC.scatter_add_(1, labels_Bk, (logits_Bk - too_much_B1).exp())
