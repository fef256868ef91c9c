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


def noise_of_each(features_GD, negatives_GK, bank_ND, temperature, z):
    """The noise term of equation 7 with negatives of each sample's own, -sum_k log(1 - h_k); its gradient with respect
    to v; and log sum_k exp(s_k)."""
    noise = negatives_GK.shape[1] / len(bank_ND)
    rows_GKD = bank_ND[negatives_GK]
    scores_GK = np.einsum("gd,gkd->gk", features_GD, rows_GKD) / temperature
    p_GK = np.exp(scores_GK) / z
    h_GK = p_GK / (p_GK + noise)
    gradient_GD = np.einsum("gk,gkd->gd", h_GK, rows_GKD) / temperature
    return -np.log(1 - h_GK).sum(1), gradient_GD, np.log(np.exp(scores_GK).sum(1))


def log_sum_exp_of_each(features_GD, negatives_GK, counts_GK, bank_ND, temperature):
    """log sum_k exp(s_k) over the negatives that count, and its gradient: 0 and -inf where none does."""
    rows_GKD = bank_ND[negatives_GK]
    exp_GK = np.exp(np.einsum("gd,gkd->gk", features_GD, rows_GKD) / temperature) * counts_GK
    sums_G = exp_GK.sum(1)
    weighted_GD = np.einsum("gk,gkd->gd", exp_GK, rows_GKD)
    with np.errstate(divide="ignore"):
        return np.log(sums_G), weighted_GD / np.where(sums_G > 0, sums_G, 1)[:, None] / temperature


def decoupled_losses(positive_G, negative_GK):
    """Equation 6 of arXiv 2110.06848, from s_i/τ and s_k/τ: the positive is not in the denominator."""
    return -positive_G + np.log(np.exp(negative_GK).sum(1))


def debiased_losses(positive_G, negative_GK, prior, temperature):
    """Equations 7 and 8 of arXiv 2007.00224 with M = 1, from s_i/τ and s_k/τ: the one other image of the positive's
    class is the positive itself."""
    num_negatives = negative_GK.shape[1]
    g_G = (np.exp(negative_GK).mean(1) - prior * np.exp(positive_G)) / (1 - prior)
    g_G = np.maximum(g_G, np.exp(-1 / temperature))
    return -np.log(np.exp(positive_G) / (np.exp(positive_G) + num_negatives * g_G))


def nearest_rows(features_GD, indices_G, bank_ND, num_hard):
    """The rows of greatest cosine with each feature, its own row left out, nearest first: a list for each sample."""
    cosines_GN = features_GD @ bank_ND.T
    cosines_GN[np.arange(len(indices_G)), indices_G] = -np.inf
    order_GN = np.argsort(-cosines_GN, axis=1, kind="stable")
    return [row_N[: min(num_hard, len(bank_ND) - 1)] for row_N in order_GN]


def effective_rank(rows_ND):
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
    singular = np.linalg.svd(rows_ND, compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return np.exp(-(shares * np.log(shares)).sum())
