"""The exact non-parametric softmax over all N rows of a sharded bank (arXiv 1805.01978, equation 2).

Shapes: B samples of this rank, G of all ranks, N rows, R rows of this rank, C rows of one block, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.collectives import all_gather_rows, gather_counts, reduce_scatter_rows
from instdisc.memory_bank import ShardedMemoryBank

SCORE_BYTES = 256 * 2**20
MIN_TEMPERATURE = 0.025


def softmax_loss(
    features_BD: Tensor,
    indices_B: Tensor,
    bank: ShardedMemoryBank,
    *,
    temperature: float,
    positives_BD: Tensor | None = None,
    counts_W: Sequence[int] | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Tensor:
    """Return the mean over the B samples of -log(exp(v_i.v/τ) / sum_j exp(v_j.v/τ)), j over all N, a float32 scalar.

    Collective: each rank brings its own batch, and its gradient covers its own features. Bank rows get no gradient.

    Each rank goes over the rows that it owns in blocks whose scores take at most `score_bytes`. Scores of unit
    vectors lie in [-1/τ, 1/τ], so one pass with the fixed shift 1/τ accumulates Z = sum_j exp(s_j - 1/τ) and
    S = sum_j exp(s_j - 1/τ) v_j. Both are sums over the ranks' rows: one reduce-scatter brings each rank those of its
    own samples. With them the loss is log Z + 1/τ - s_i and its gradient (S / Z - v_i) / τ.

    indices_B: int64 on the CPU. positives_BD, counts_W: the samples' own rows, float32, and B of every rank, where the
    caller knows them (all ranks or none). temperature: at least 0.025, since exp(-2/τ) must stay a normal float32.
    With B = 0 the loss is 0.
    """
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"softmax_loss temperature: found {temperature}, expected at least {MIN_TEMPERATURE}")
    counts_W = counts_W or gather_counts(len(indices_B), bank.group)
    if positives_BD is None:
        positives_BD = bank.lookup(indices_B, counts_W=counts_W)
    loss_B = _ExactSoftmax.apply(features_BD.float(), positives_BD, bank, temperature, counts_W, score_bytes)
    return loss_B.sum() / max(1, len(loss_B))


class _ExactSoftmax(torch.autograd.Function):
    """Loss per sample; the gradient is ready when the forward pass ends, since S comes with Z."""

    @staticmethod
    def forward(ctx, features_BD, positives_BD, bank, temperature, counts_W, score_bytes):
        features_GD = all_gather_rows(features_BD.detach(), counts_W, bank.group)
        sums_GE = _sums_over_rows(features_GD, bank.rows, temperature, score_bytes)
        sums_BE = reduce_scatter_rows(sums_GE, counts_W, bank.group)
        weighted_BD, z_B = sums_BE[:, :-1], sums_BE[:, -1]
        ctx.save_for_backward((weighted_BD / z_B[:, None] - positives_BD) / temperature)
        score_B = (features_BD * positives_BD).sum(dim=1) / temperature
        return z_B.log() + 1 / temperature - score_B

    @staticmethod
    def backward(ctx, *grad_outputs):
        (gradient_BD,) = ctx.saved_tensors
        return grad_outputs[0][:, None] * gradient_BD, None, None, None, None, None


def _sums_over_rows(features_GD, rows_RD, temperature, score_bytes):
    """Return S and, in the last column, Z over the rows of this rank, block by block: (G, E), E = D + 1."""
    num_features, dim = features_GD.shape
    sums_GE = features_GD.new_zeros(num_features, dim + 1)
    block_rows = max(1, score_bytes // (4 * max(1, num_features)))
    scaled_GD = features_GD / temperature
    for start in range(0, len(rows_RD), block_rows):
        block_CD = rows_RD[start : start + block_rows].float()
        scores_GC = torch.matmul(scaled_GD, block_CD.T).sub_(1 / temperature).exp_()
        sums_GE[:, -1] += scores_GC.sum(dim=1)
        sums_GE[:, :-1].addmm_(scores_GC, block_CD)
    return sums_GE
