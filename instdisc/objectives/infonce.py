"""InfoNCE: softmax cross-entropy over the positive and sampled negatives (arXiv 1807.03748; with a bank, 1906.05849).

Shapes: B samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def infonce_loss(
    features_BD: Tensor,
    positives_BD: Tensor,
    negatives_KD: Tensor,
    *,
    temperature: float,
    excluded_BK: Tensor | None = None,
) -> Tensor:
    """Return the mean over the samples of -log(exp(s_i/τ) / (exp(s_i/τ) + sum_k exp(s_k/τ))), a float32 scalar.

    excluded_BK: bool, True where a negative is the sample's own row and must not count. With B = 0 the loss is 0.
    """
    features_BD = features_BD.float()
    positive_B1 = (features_BD * positives_BD).sum(dim=1, keepdim=True) / temperature
    negative_BK = (features_BD @ negatives_KD.T) / temperature
    if excluded_BK is not None:
        negative_BK = negative_BK.masked_fill(excluded_BK.to(negative_BK.device, non_blocking=True), -math.inf)
    loss_B = torch.logsumexp(torch.cat([positive_B1, negative_BK], dim=1), dim=1) - positive_B1[:, 0]
    return loss_B.sum() / max(1, len(loss_B))
