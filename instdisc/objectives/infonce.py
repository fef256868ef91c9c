"""InfoNCE: softmax cross-entropy over the positive and sampled negatives (arXiv 1807.03748; with a bank, 1906.05849).

Shapes: B samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from instdisc.objectives.blocks import sample_blocks
from instdisc.objectives.gradients import first_order, require_fixed
from instdisc.objectives.own_rows import ScorePlaces

MAX_LOG_RATIO = 20.0


def infonce_loss(
    features_BD: Tensor,
    positives_BD: Tensor,
    negatives_KD: Tensor,
    *,
    temperature: float,
    excluded_BK: Tensor | None = None,
) -> Tensor:
    """Return the mean over the samples of -log(exp(s_i/τ) / (exp(s_i/τ) + sum_k exp(s_k/τ))), a float32 scalar.

    excluded_BK: bool, on the CPU, True where a negative is the sample's own row and must not count (training has the
    few places instead, `own_rows.own_places`). With B = 0 the loss is 0. Bank rows get no gradient; ValueError for
    those that require one.
    """
    require_fixed(positives=positives_BD)
    excluded = None if excluded_BK is None else ScorePlaces.of_mask(excluded_BK)
    negative_B = log_sum_exp(features_BD, negatives_KD, temperature=temperature, excluded=excluded)
    positive_B = (features_BD.float() * positives_BD).sum(dim=1) / temperature
    return contrast(positive_B, negative_B).sum() / max(1, len(positive_B))


def contrast(
    positive_B: Tensor,
    negative_B: Tensor,
    *,
    denominator: str = "standard",
    num_negatives: int = 1,
    prior: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """Return the loss of each sample from its positive's score s_i/τ and log sum_k exp(s_k/τ) of its negatives, (B,).

    denominator: "standard", the positive and the negatives; "decoupled", the negatives alone (arXiv 2110.06848,
    equation 6); "debiased", the positive and an estimate of the negatives that are not of its class (arXiv 2007.00224,
    equation 8 with M = 1):  g = max((sum_k exp(s_k/τ) / K - prior exp(s_i/τ)) / (1 - prior), exp(-1/τ)), K times.
    prior: the share of images of the positive's own class; num_negatives, temperature: K and τ of that estimate.
    """
    if denominator == "decoupled":
        return torch.where(negative_B > -math.inf, negative_B - positive_B, 0)
    if denominator == "debiased":
        log_mean_B = negative_B - math.log(num_negatives)
        share_B = prior * (positive_B - log_mean_B).clamp(max=MAX_LOG_RATIO).exp()
        # Where more than all of the mean would be taken away the floor holds, and the mean has no gradient.
        left_B = torch.where(share_B < 1, 1 - share_B, 1)
        log_g_B = torch.where(share_B < 1, log_mean_B + left_B.log() - math.log1p(-prior), -math.inf)
        negative_B = log_g_B.clamp(min=-1 / temperature) + math.log(num_negatives)
    # log(exp(p) + exp(n)) - p would lose the digits of a sample that is nearly solved, where p >> n.
    return F.softplus(negative_B - positive_B)


def log_sum_exp(
    features_BD: Tensor, negatives_KD: Tensor, *, temperature: float, excluded: ScorePlaces | None = None
) -> Tensor:
    """Return log sum_k exp(v_k.v/τ) of each sample over the negatives that are not excluded, float32 (B,).

    -inf, without gradient, where all are excluded. ValueError for negatives that require gradients.
    """
    require_fixed(negatives=negatives_KD, temperature=temperature)
    with torch.autocast(features_BD.device.type, enabled=False):
        return _LogSumExp.apply(features_BD.float(), negatives_KD.float(), temperature, excluded)  # pyright: ignore


class _LogSumExp(torch.autograd.Function):
    """L = log sum_k exp(s_k) with s_k = v_k.v / τ; its gradient is sum_k exp(s_k - L) v_k / τ.

    Both come from the scores block by block, while these are in the caches; B x K scores are never kept.
    """

    @staticmethod
    def forward(ctx, features_BD, negatives_KD, temperature, excluded):
        scaled_BD, mean_BD = features_BD / temperature, torch.empty_like(features_BD)
        log_sums_B = features_BD.new_empty(len(features_BD))
        blocks = list(sample_blocks(features_BD, len(negatives_KD)))
        places = excluded and excluded.in_rows(blocks, len(negatives_KD), features_BD.device)
        for number, block in enumerate(blocks):
            scores_bK = scaled_BD[block] @ negatives_KD.T
            if places:
                scores_bK.view(-1).index_fill_(0, places[number], -math.inf)
            most_b1 = scores_bK.amax(dim=1, keepdim=True).clamp_min(torch.finfo(scores_bK.dtype).min)
            sums_b1 = scores_bK.sub_(most_b1).exp_().sum(dim=1, keepdim=True)
            mean_BD[block] = scores_bK @ negatives_KD / sums_b1.clamp_min(torch.finfo(sums_b1.dtype).tiny)
            log_sums_B[block] = (most_b1 + sums_b1.log())[:, 0]
        ctx.save_for_backward(mean_BD)
        ctx.temperature = temperature
        return log_sums_B

    @staticmethod
    @first_order
    def backward(ctx, *grad_outputs):
        (mean_BD,) = ctx.saved_tensors
        return mean_BD * (grad_outputs[0] / ctx.temperature)[:, None], None, None, None
