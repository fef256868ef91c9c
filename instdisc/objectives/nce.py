"""Noise-contrastive estimation of the non-parametric softmax (arXiv 1805.01978, sections 3.2 and 3.3).

Shapes: B samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from instdisc.config_method import MIN_SUM_TEMPERATURE
from instdisc.objectives.blocks import sample_blocks
from instdisc.objectives.gradients import first_order, require_fixed

MAX_LOG_ODDS = 80.0
"""exp of it is a float32 number; the loss of a score that is further from the offset grows no more."""


def nce_loss(
    features_BD: Tensor,
    positives_BD: Tensor,
    negatives_KD: Tensor,
    *,
    temperature: float,
    log_z: Tensor | float,
    num_rows: int,
    proximal_weight: float = 0.0,
) -> Tensor:
    """Return the mean over the samples of the NCE loss with its proximal term, a float32 scalar.

    The model's probability of instance i is P(i|v) = exp(v_i.v / τ) / Z, the noise is uniform, P_n = 1/N, m = K. With
    h = P / (P + m P_n):  -log h(i, v) - sum_k log(1 - h(k, v)) + λ |v - v_i|^2  (equations 7 and 9).
    Negatives are shared by the batch and keep accidental positives, since the noise is uniform over all N.

    features_BD and positives_BD (the samples' own bank rows): unit length. log_z: log of the normaliser over all N.
    proximal_weight: λ. With B = 0 the loss is 0. Bank rows and Z get no gradient; ValueError for those that require
    one.
    """
    offset = nce_offset(log_z, len(negatives_KD), num_rows)
    noise_B, _ = noise_terms(features_BD, negatives_KD, temperature=temperature, offset=offset)
    loss_B = data_terms(
        features_BD,
        positives_BD,
        temperature=temperature,
        offset=offset,
        proximal_weight=proximal_weight,
    )
    return (loss_B + noise_B).sum() / max(1, len(features_BD))


def nce_offset(log_z: Tensor | float, num_negatives: int, num_rows: int) -> Tensor | float:
    """Return log(Z m P_n): a score less it is the log of the odds of data against noise."""
    return log_z + math.log(max(1, num_negatives) / num_rows)


def data_terms(
    features_BD: Tensor, positives_BD: Tensor, *, temperature: float, offset: Tensor | float, proximal_weight: float
) -> Tensor:
    """Return -log h(i, v) + λ |v - v_i|^2 of each sample, float32 (B,)."""
    require_fixed(positives=positives_BD, temperature=temperature, offset=offset)
    features_BD = features_BD.float()
    # log h = log sigmoid(log P - log(m P_n)): never exp of a score.
    loss_B = F.softplus(offset - (features_BD * positives_BD).sum(dim=1) / temperature)
    if proximal_weight:
        loss_B = loss_B + proximal_weight * (features_BD - positives_BD).square().sum(dim=1)
    return loss_B


def noise_terms(
    features_BD: Tensor, negatives_KD: Tensor, *, temperature: float, offset: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return -sum_k log(1 - h(k, v)) and, for Z and without gradient, log sum_k exp(s_k) of samples, float32 (B,)."""
    require_fixed(negatives=negatives_KD, temperature=temperature, offset=offset)
    with torch.autocast(features_BD.device.type, enabled=False):
        return _NoiseTerms.apply(features_BD.float(), negatives_KD.float(), temperature, offset)  # pyright: ignore


class _NoiseTerms(torch.autograd.Function):
    """-log(1 - h_k) = log(1 + e_k) with e_k = exp(v_k.v / τ - offset); its gradient is sum_k e_k / (1 + e_k) v_k / τ.

    Loss, gradient and the sum for Z come from one exponential of each score, block by block, while the scores are in
    the caches: the backward pass is a product with (B,) numbers, and B x K scores are never kept.
    """

    @staticmethod
    def forward(ctx, features_BD, negatives_KD, temperature, offset):
        scaled_BD, weighted_BD = features_BD / temperature, torch.empty_like(features_BD)
        loss_B, log_sums_B = features_BD.new_empty(len(features_BD)), features_BD.new_empty(len(features_BD))
        for block in sample_blocks(features_BD, len(negatives_KD)):
            odds_bK = scaled_BD[block] @ negatives_KD.T
            if temperature < MIN_SUM_TEMPERATURE:
                # Elsewhere |x| <= 2/τ + log K, for any Z that a mean of exponentials can be. Here exp(x) can be 0 or
                # infinite in float32.
                log_sums_B[block] = torch.logsumexp(odds_bK, dim=1)
                odds_bK.sub_(offset).clamp_(max=MAX_LOG_ODDS).exp_()
            else:
                odds_bK.sub_(offset).exp_()
                log_sums_B[block] = odds_bK.sum(dim=1).log() + offset
            scratch_bK = torch.log1p(odds_bK)
            loss_B[block] = scratch_bK.sum(dim=1)
            torch.add(odds_bK, 1, out=scratch_bK)
            weighted_BD[block] = odds_bK.div_(scratch_bK) @ negatives_KD
        ctx.save_for_backward(weighted_BD)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(log_sums_B)
        return loss_B, log_sums_B

    @staticmethod
    @first_order
    def backward(ctx, *grad_outputs):
        (weighted_BD,) = ctx.saved_tensors
        return weighted_BD * (grad_outputs[0] / ctx.temperature)[:, None], None, None, None
