"""The exact non-parametric softmax over all N rows of a sharded bank (arXiv 1805.01978, equation 2).

Shapes: B samples of this rank, G of all ranks, N rows, R rows of this rank, C rows of one block, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.collectives import all_gather_rows, all_reduce_sum, gather_counts, rank, reduce_scatter_rows
from instdisc.memory_bank import ShardedMemoryBank

SCORE_BYTES = 256 * 2**20
MIN_TEMPERATURE = 0.025


def softmax_loss(
    features_BD: Tensor,
    indices_B: Tensor,
    bank: ShardedMemoryBank,
    *,
    temperature: float,
    counts_W: Sequence[int] | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Tensor:
    """Return the mean over the B samples of -log(exp(v_i.v/τ) / sum_j exp(v_j.v/τ)), j over all N, a float32 scalar.

    Collective: each rank brings its own batch, and its gradient covers its own features. Bank rows get no gradient.

    Each rank goes over the rows that it owns in blocks whose scores take at most `score_bytes`. Scores of unit
    vectors lie in [-1/τ, 1/τ], so one pass with the fixed shift 1/τ accumulates Z = sum_j exp(s_j - 1/τ) and
    S = sum_j exp(s_j - 1/τ) v_j; with these the loss is log Z + 1/τ - s_i and its gradient (S / Z - v_i) / τ.

    indices_B: int64 on the CPU. counts_W: B of every rank, where the caller knows it. temperature: at least 0.025,
    since exp(-2/τ) must stay a normal float32. With B = 0 the loss is 0.
    """
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"softmax_loss temperature: found {temperature}, expected at least {MIN_TEMPERATURE}")
    counts_W = counts_W or gather_counts(len(indices_B), bank.group)
    loss_B = _ExactSoftmax.apply(features_BD.float(), indices_B, bank, temperature, counts_W, score_bytes)
    return loss_B.sum() / max(1, len(loss_B))


class _ExactSoftmax(torch.autograd.Function):
    """Loss per sample; the gradient is ready when the forward pass ends, since S comes with Z."""

    @staticmethod
    def forward(ctx, features_BD, indices_B, bank, temperature, counts_W, score_bytes):
        features_GD = all_gather_rows(features_BD.detach(), counts_W, bank.group)
        indices_G = all_gather_rows(indices_B, counts_W, bank.group)
        z_G, weighted_GD = _sums_over_rows(features_GD, bank.rows, temperature, score_bytes)
        positives_GD = _owned_positives(indices_G, bank)
        score_G = (features_GD * positives_GD).sum(dim=1) / temperature
        z_G, score_G = all_reduce_sum(torch.stack([z_G, score_G]), bank.group)
        partial_GD = weighted_GD / z_G[:, None] - positives_GD
        gradient_BD = reduce_scatter_rows(partial_GD, counts_W, bank.group) / temperature
        ctx.save_for_backward(gradient_BD)
        first = sum(counts_W[: rank(bank.group)])
        own = slice(first, first + len(indices_B))
        return z_G[own].log() + 1 / temperature - score_G[own]

    @staticmethod
    def backward(ctx, *grad_outputs):
        (gradient_BD,) = ctx.saved_tensors
        return grad_outputs[0][:, None] * gradient_BD, None, None, None, None, None


def _sums_over_rows(features_GD, rows_RD, temperature, score_bytes):
    """Return Z (G,) and S (G, D) over the rows of this rank, block by block."""
    num_features = len(features_GD)
    z_G = features_GD.new_zeros(num_features)
    weighted_GD = torch.zeros_like(features_GD)
    block_rows = max(1, score_bytes // (4 * max(1, num_features)))
    scaled_GD = features_GD / temperature
    for start in range(0, len(rows_RD), block_rows):
        block_CD = rows_RD[start : start + block_rows].float()
        scores_GC = torch.matmul(scaled_GD, block_CD.T).sub_(1 / temperature).exp_()
        z_G += scores_GC.sum(dim=1)
        weighted_GD.addmm_(scores_GC, block_CD)
    return z_G, weighted_GD


def _owned_positives(indices_G: Tensor, bank: ShardedMemoryBank) -> Tensor:
    """Return the samples' own rows where this rank owns them and zeros elsewhere, float32 (G, D)."""
    places = torch.nonzero((indices_G >= bank.start) & (indices_G < bank.stop))[:, 0]
    positives_GD = torch.zeros((len(indices_G), bank.dim), device=bank.device)
    local = (indices_G[places] - bank.start).to(bank.device, non_blocking=True)
    positives_GD[places.to(bank.device, non_blocking=True)] = bank.rows.index_select(0, local).float()
    return positives_GD
