"""The papers' formulas in float64 NumPy, written from the papers and not from our code.

Shapes: N rows, G samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax_losses(features_GD, indices_G, bank_ND, temperature):
    """Equation 2 of arXiv 1805.01978: -log P(i|v), and the gradient of each loss with respect to v."""
    logits_GN = features_GD @ bank_ND.T / temperature
    logits_GN -= logits_GN.max(axis=1, keepdims=True)
    p_GN = np.exp(logits_GN)
    p_GN /= p_GN.sum(axis=1, keepdims=True)
    samples = np.arange(len(indices_G))
    losses_G = -np.log(p_GN[samples, indices_G])
    return losses_G, (p_GN @ bank_ND - bank_ND[indices_G]) / temperature


def nce_losses(features_GD, indices_G, negatives_K, bank_ND, temperature, z, proximal_weight):
    """Equations 4 to 9: h(i, v) = P / (P + m Pn) with P = exp(v_i.v/τ)/Z, Pn = 1/N; and the gradient."""
    num_rows, m = len(bank_ND), len(negatives_K)
    noise = m / num_rows
    positives_GD, rows_KD = bank_ND[indices_G], bank_ND[negatives_K]
    p_G = np.exp((features_GD * positives_GD).sum(1) / temperature) / z
    p_GK = np.exp(features_GD @ rows_KD.T / temperature) / z
    h_G, h_GK = p_G / (p_G + noise), p_GK / (p_GK + noise)
    difference_GD = features_GD - positives_GD
    losses_G = -np.log(h_G) - np.log(1 - h_GK).sum(1) + proximal_weight * (difference_GD**2).sum(1)
    gradient_GD = (-(1 - h_G)[:, None] * positives_GD + h_GK @ rows_KD) / temperature
    return losses_G, gradient_GD + 2 * proximal_weight * difference_GD


def infonce_losses(features_GD, indices_G, negatives_K, bank_ND, temperature):
    """-log(exp(s_i/τ) / (exp(s_i/τ) + sum of exp(s_k/τ) over negatives other than i)); and the gradient."""
    positives_GD, rows_KD = bank_ND[indices_G], bank_ND[negatives_K]
    pos_G = np.exp((features_GD * positives_GD).sum(1) / temperature)
    neg_GK = np.exp(features_GD @ rows_KD.T / temperature) * (negatives_K[None, :] != indices_G[:, None])
    total_G = pos_G + neg_GK.sum(1)
    weighted_GD = (pos_G[:, None] * positives_GD + neg_GK @ rows_KD) / total_G[:, None]
    return -np.log(pos_G / total_G), (weighted_GD - positives_GD) / temperature


def updated_bank(bank_ND, last_step_N, indices_G, features_GD, valid_G, momentum, step):
    """v_i <- normalise(momentum * v_i + (1 - momentum) * f_i); where a row stands twice, the later sample counts."""
    bank_ND, last_step_N = bank_ND.copy(), last_step_N.copy()
    before_ND = bank_ND.copy()
    for index, feature_D, valid in zip(indices_G, features_GD, valid_G, strict=True):
        if valid:
            bank_ND[index] = unit(momentum * before_ND[index] + (1 - momentum) * feature_D)
            last_step_N[index] = step
    return bank_ND, last_step_N
