"""Weighted k-nearest-neighbour classification (arXiv 1805.01978, section 3.4), on one process or on a sharded gallery.

Neighbours are the same at any number of ranks, in any batch of queries and on any device: cosines are those of features
in fixed point, whose sums are exact in any order, and of rows that are as near the one with the lower number comes
first. A row without a direction (length 0, or not finite), as an image that cannot be decoded has it, is nobody's
neighbour and has none.

Shapes: B queries, N gallery rows, R gallery rows of this rank, C rows of a block or classes, k neighbours, D feature
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.collectives import Group, all_gather_rows, gather_counts

_BLOCK_SCORES = 2**23
_BLOCK_NUMBERS = 2**23
"""Numbers of gallery rows that are converted at a time."""
_STEPS = 2.0**25
"""Features are multiples of 1/2^25: sums of their products are multiples of 1/2^50, which float64 holds exactly."""

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
    return nearest_sharded(queries_BD, gallery_ND, labels_N, 0, k).votes(temperature, num_classes)


def nearest(queries_BD: Tensor, gallery_ND: Tensor, k: int, *, usable_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cosines, float32 (B, k), and the gallery rows, int64 (B, k), of the k nearest, the nearest first.

    usable_N: bool, False for rows that are no neighbours. Where there are fewer than k, cosines are -inf and rows -1.
    """
    scores_Bk, rows_Bk = _nearest(queries_BD, gallery_ND, k, usable_N, None)
    return scores_Bk.float(), rows_Bk


@dataclass(frozen=True)
class Neighbours:
    """The k nearest gallery rows of each query: cosines, row numbers of the whole gallery, and their labels.

    Where a query has fewer neighbours, cosines are -inf, rows -1 and labels 0.
    """

    scores_Bk: Tensor
    rows_Bk: Tensor
    labels_Bk: Tensor

    def votes(self, temperature: float, num_classes: int) -> Tensor:
        """Return the weighted votes, float64 (B, C), on the CPU; none for a query without neighbours."""
        # There sums are added in the order of the neighbours, on every rank alike.
        return _votes(self.scores_Bk.cpu(), self.labels_Bk.cpu(), temperature, num_classes)


def nearest_sharded(
    queries_BD: Tensor,
    gallery_RD: Tensor,
    labels_R: Tensor,
    start: int,
    k: int,
    group: Group = None,
    *,
    usable_R: Tensor | None = None,
    own_B: Tensor | None = None,
) -> Neighbours:
    """Return the neighbours of the same queries on every rank over a gallery whose rows [start, start+R) are here.

    usable_R: as in `nearest`. own_B: int64, the row of the whole gallery that is the query itself, which is not its own
    neighbour; -1 for none. Each rank finds its own k nearest and sends those, k*B numbers whatever the gallery's size.
    Collective.
    """
    own_here_B = None if own_B is None else own_B - start
    scores_Bk, places_Bk = _nearest(queries_BD, gallery_RD, k, usable_R, own_here_B)
    none_Bk = places_Bk < 0
    labels_Bk = labels_R.to(places_Bk.device)[places_Bk.clamp(min=0)] if len(labels_R) else places_Bk
    rows_Bk = (places_Bk + start).masked_fill(none_Bk, -1)
    local = (scores_Bk.T, rows_Bk.T, labels_Bk.masked_fill(none_Bk, 0).T)
    counts_W = gather_counts(local[0].shape[0], group)
    # Rank after rank, so that of equal cosines the lower rows come first.
    scores_BM, rows_BM, labels_BM = (all_gather_rows(part.contiguous(), counts_W, group).T for part in local)
    best_Bk = _first_best(scores_BM, min(k, scores_BM.shape[1]))
    return Neighbours(*(part_BM.gather(1, best_Bk) for part_BM in (scores_BM, rows_BM, labels_BM)))


def top1(votes_BC: Tensor, labels_B: Tensor) -> float:
    """Return the share of queries whose strongest vote is their label, in percent; of those that have votes.

    NaN where none has.
    """
    has_votes_B = votes_BC.amax(dim=1) > 0
    is_right_B = votes_BC.argmax(dim=1) == labels_B.to(votes_BC.device)
    return 100.0 * is_right_B[has_votes_B].double().mean().item()


def _nearest(
    queries_BD: Tensor, gallery_ND: Tensor, k: int, usable_N: Tensor | None, own_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the cosines, float64 (B, k), and the rows, int64 (B, k), of the k nearest; -inf and -1 for none.

    own_B: the row that is not a query's neighbour; any number outside of 0..N-1 for none.
    """
    device, num_rows = queries_BD.device, len(gallery_ND)
    k = min(k, num_rows)
    queries_BD, has_direction_B = _in_fixed_point(queries_BD)
    scores_Bk = queries_BD.new_full((len(queries_BD), k), -math.inf)
    rows_Bk = torch.full((len(queries_BD), k), -1, dtype=torch.int64, device=device)
    block_rows = max(1, _BLOCK_NUMBERS // max(1, gallery_ND.shape[1]))
    for start in range(0, num_rows, block_rows):
        # A block at a time, so that rows of 16 bits or in another memory are never converted or copied as a whole.
        block_CD, usable_C = _in_fixed_point(gallery_ND[start : start + block_rows].to(device))
        if usable_N is not None:
            usable_C &= usable_N[start : start + block_rows].to(device)
        has_unusable, size = not bool(usable_C.all()), max(1, _BLOCK_SCORES // len(block_CD))
        for first in range(0, len(queries_BD), size):
            part = slice(first, first + size)
            scores_bC = queries_BD[part] @ block_CD.T
            if has_unusable:
                scores_bC.masked_fill_(~usable_C, -math.inf)
            if own_B is not None:
                own_b = own_B[part].to(device) - start
                (found,) = ((own_b >= 0) & (own_b < len(block_CD))).nonzero(as_tuple=True)
                scores_bC[found, own_b[found]] = -math.inf
            best_bk = _first_best(scores_bC, min(k, len(block_CD)))
            # Those of the blocks before come first: their rows are lower.
            both_bK = torch.cat([scores_Bk[part], scores_bC.gather(1, best_bk)], dim=1)
            rows_bK = torch.cat([rows_Bk[part], best_bk + start], dim=1)
            best_bk = _first_best(both_bK, k)
            scores_Bk[part], rows_Bk[part] = both_bK.gather(1, best_bk), rows_bK.gather(1, best_bk)
    scores_Bk.masked_fill_(~has_direction_B[:, None], -math.inf)
    return scores_Bk, rows_Bk.masked_fill_(scores_Bk == -math.inf, -1)


def _in_fixed_point(features_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of features in multiples of 1/2^25, float64 (B, D), and which have one, bool (B,)."""
    features_BD = features_BD.double()
    lengths_B1 = torch.linalg.vector_norm(features_BD, dim=1, keepdim=True)
    has_direction_B1 = (lengths_B1 > 0) & (lengths_B1 < math.inf)
    directions_BD = torch.where(has_direction_B1, features_BD / lengths_B1, 0.0).mul_(_STEPS).round_().div_(_STEPS)
    return directions_BD, has_direction_B1[:, 0]


def _first_best(scores_BC: Tensor, k: int) -> Tensor:
    """Return the places of the k highest scores, the highest first and of equal ones the first, int64 (B, k)."""
    if k == 0:
        return torch.zeros((len(scores_BC), 0), dtype=torch.int64, device=scores_BC.device)
    # topk does not say which of equal scores it takes: that matters where the first that it leaves is one of them.
    top = torch.topk(scores_BC, min(k + 1, scores_BC.shape[1]), dim=1)
    places_Bk = torch.sort(top.indices[:, :k], dim=1).values
    tied_b = (
        (top.values[:, k - 1] == top.values[:, -1]).nonzero()[:, 0] if top.values.shape[1] > k else top.indices[:0, 0]
    )
    if len(tied_b):
        scores_bC, least_b1 = scores_BC[tied_b], top.values[tied_b, k - 1 : k]
        is_more_bC, is_least_bC = scores_bC > least_b1, scores_bC == least_b1
        wanted_b1 = k - is_more_bC.sum(dim=1, keepdim=True)
        chosen_bC = is_more_bC | (is_least_bC & (is_least_bC.cumsum(dim=1, dtype=torch.int32) <= wanted_b1))
        places_Bk[tied_b] = chosen_bC.nonzero()[:, 1].view(len(tied_b), k)
    order_Bk = torch.sort(scores_BC.gather(1, places_Bk), dim=1, descending=True, stable=True).indices
    return places_Bk.gather(1, order_Bk)


def _votes(scores_Bk: Tensor, labels_Bk: Tensor, temperature: float, num_classes: int) -> Tensor:
    votes_BC = torch.zeros((len(scores_Bk), num_classes), dtype=torch.float64)
    if not scores_Bk.shape[1]:
        return votes_BC
    logits_Bk = scores_Bk.double() / temperature
    # exp overflows float64 above 709 and is 0 below -745; a factor for each query changes no order among its classes.
    highest_B1 = logits_Bk.amax(dim=1, keepdim=True)
    beyond_B1 = highest_B1 - highest_B1.clamp(-_MAX_LOGIT, _MAX_LOGIT)
    beyond_B1 = torch.where(highest_B1 == -math.inf, 0.0, beyond_B1)
    return votes_BC.scatter_add_(1, labels_Bk, (logits_Bk - beyond_B1).exp())
