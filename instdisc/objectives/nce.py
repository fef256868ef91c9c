"""Noise-contrastive estimation of the non-parametric softmax (arXiv 1805.01978, sections 3.2 and 3.3).

Shapes: B samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


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
    proximal_weight: λ. With B = 0 the loss is 0.
    """
    loss, _ = nce_loss_and_scores(
        features_BD,
        positives_BD,
        negatives_KD,
        temperature=temperature,
        log_z=log_z,
        num_rows=num_rows,
        proximal_weight=proximal_weight,
    )
    return loss


def nce_loss_and_scores(
    features_BD: Tensor,
    positives_BD: Tensor,
    negatives_KD: Tensor,
    *,
    temperature: float,
    log_z: Tensor | float,
    num_rows: int,
    proximal_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return `nce_loss` and, for the estimate of Z, the scores v_k.v / τ without gradient, float32 (B, K)."""
    features_BD = features_BD.float()
    # log h = log sigmoid(log P - log(m P_n)), and log(1 - h) = log sigmoid of the negative: never exp of a score.
    offset = log_z + math.log(negatives_KD.shape[0] / num_rows)
    positive_B = (features_BD * positives_BD).sum(dim=1) / temperature - offset
    scores_BK = (features_BD @ negatives_KD.T) / temperature
    loss_B = F.softplus(-positive_B) + F.softplus(scores_BK - offset).sum(dim=1)
    if proximal_weight:
        loss_B = loss_B + proximal_weight * (features_BD - positives_BD).square().sum(dim=1)
    return loss_B.sum() / max(1, len(loss_B)), scores_BK.detach()
