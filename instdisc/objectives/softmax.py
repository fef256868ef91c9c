"""The exact non-parametric softmax over all N rows of a sharded bank (arXiv 1805.01978, equation 2).

Shapes: B samples of this rank, G of all ranks, N rows, R rows of this rank, C rows of one block, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.collectives import all_gather_rows, gather_counts, reduce_scatter_rows
from dataloading.device_copies import to_device
from instdisc.config_method import MIN_SUM_TEMPERATURE
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.objectives.gradients import first_order, require_fixed
from instdisc.objectives.own_rows import ScorePlaces, owned_places

SCORE_BYTES = 256 * 2**20
CACHED_SCORE_BYTES = 2**22
"""On a CPU blocks are no larger than this: scores that stay in its caches are read again for nothing."""


def softmax_loss(
    features_BD: Tensor,
    indices_B: Tensor,
    bank: ShardedMemoryBank,
    *,
    temperature: float,
    score_bytes: int = SCORE_BYTES,
) -> Tensor:
    """Return the mean over the B samples of -log(exp(v_i.v/τ) / sum_j exp(v_j.v/τ)), j over all N, a float32 scalar.

    Collective: each rank brings its own batch, and its gradient covers its own features. Bank rows get no gradient.
    indices_B: int64 on the CPU. temperature, score_bytes: as in `softmax_losses`. With B = 0 the loss is 0.
    """
    counts_W = gather_counts(len(indices_B), bank.group)
    losses_B = softmax_losses(
        features_BD,
        bank.lookup(indices_B, counts_W=counts_W),
        all_gather_rows(indices_B, counts_W, bank.group),
        bank,
        temperature=temperature,
        counts_W=counts_W,
        score_bytes=score_bytes,
    )
    return losses_B.sum() / max(1, len(losses_B))


def softmax_losses(
    features_BD: Tensor,
    positives_BD: Tensor,
    indices_G: Tensor,
    bank: ShardedMemoryBank,
    *,
    temperature: float,
    counts_W: Sequence[int],
    score_bytes: int = SCORE_BYTES,
) -> Tensor:
    """Return the loss of each sample, float32 (B,). Collective.

    positives_BD: the samples' own rows, float32. indices_G: the row numbers of the samples of all ranks, int64 on the
    CPU, in rank order. counts_W: B of every rank. temperature: at least 0.025, so that sums of exp(s) for s in
    [-1/τ, 1/τ] are float32 numbers. score_bytes: most bytes of scores at a time. Raises ValueError for a temperature or
    a limit that is too small, and for rows that require gradients.
    """
    require_fixed(positives=positives_BD, rows=bank.rows, temperature=temperature)
    if temperature < MIN_SUM_TEMPERATURE:
        raise ValueError(f"softmax_loss temperature: found {temperature}, expected at least {MIN_SUM_TEMPERATURE}")
    if score_bytes < 4 * sum(counts_W):
        raise ValueError(
            f"softmax_loss score_bytes: found {score_bytes}, expected at least {4 * sum(counts_W)}, one row of "
            f"the bank for {sum(counts_W)} samples"
        )
    return _ExactSoftmax.apply(  # pyright: ignore[reportReturnType]
        features_BD.float(), positives_BD, indices_G, bank, temperature, counts_W, score_bytes
    )


class _ExactSoftmax(torch.autograd.Function):
    """Loss and gradient of each sample from one pass over the bank, in which no rank holds G x N scores.

    With s_j = v_j.v / τ and Z = sum exp(s_j) over all rows but the sample's own, the loss of a sample is
    L = log(Z + exp(s_i)) - s_i = softplus(log Z - s_i),  and since  ds_j/dv = v_j / τ,

        dL/dv = sigmoid(log Z - s_i) (S / Z - v_i) / τ,  S = sum exp(s_j) v_j over the same rows.

    With the own row among them, both would be differences of nearly equal numbers for a sample that is nearly solved.

    Z and S are sums over rows, so each rank adds up those of the rows that it owns, for the features of all ranks,
    block by block: a product for the scores, exp, a product with the same rows. One reduce-scatter adds the ranks' sums
    and brings each rank those of its own samples: G x (D+1) numbers, whatever N. The gradient is ready when the forward
    pass ends; the backward pass scales it.

    Scores of unit vectors lie in [-1/τ, 1/τ], so no maximum is searched for: with a fixed shift c, exp(s - c) neither
    overflows nor vanishes for τ >= 0.025 and any N below 10^20. c = 0 lies in the middle of that range and costs no
    pass over the scores.
    """

    @staticmethod
    def forward(ctx, features_BD, positives_BD, indices_G, bank, temperature, counts_W, score_bytes):
        features_GD = all_gather_rows(features_BD.detach(), counts_W, bank.group)
        own = owned_places(indices_G, bank.start, bank.stop)
        sums_GE = _sums_over_rows(features_GD, own, bank.rows, temperature, score_bytes)
        sums_BE = reduce_scatter_rows(sums_GE, counts_W, bank.group)
        weighted_BD, z_B = sums_BE[:, :-1], sums_BE[:, -1]
        odds_B = z_B.log() - (features_BD * positives_BD).sum(dim=1) / temperature
        others_BD = weighted_BD / z_B.clamp_min(torch.finfo(z_B.dtype).tiny)[:, None]  # Z is 0 where N is 1
        ctx.save_for_backward((others_BD - positives_BD) * (odds_B.sigmoid() / temperature)[:, None])
        return F.softplus(odds_B)

    @staticmethod
    @first_order
    def backward(ctx, *grad_outputs):
        (gradient_BD,) = ctx.saved_tensors
        return grad_outputs[0][:, None] * gradient_BD, None, None, None, None, None, None


def _sums_over_rows(
    features_GD: Tensor, own: ScorePlaces, rows_RD: Tensor, temperature: float, score_bytes: int
) -> Tensor:
    """Return S and, in the last column, Z over the rows of this rank: float32 (G, E), E = D + 1.

    own: scores that must not count. Rows of 16 bits and rows in host memory are converted and copied a block at a time,
    never the shard.
    """
    num_features, dim = features_GD.shape
    sums_GE = features_GD.new_zeros(num_features, dim + 1)
    if num_features == 0:
        return sums_GE
    if features_GD.device.type == "cpu":
        score_bytes = min(score_bytes, max(CACHED_SCORE_BYTES, 4 * num_features))
    # With few samples a block's converted rows take more than its scores: they are held to the same limit.
    block_rows = max(1, min(len(rows_RD), score_bytes // (4 * max(num_features, dim))))
    scaled_GD = features_GD / temperature
    memory = features_GD.new_empty(num_features * block_rows)
    blocks = [slice(at, min(len(rows_RD), at + block_rows)) for at in range(0, len(rows_RD), block_rows)]
    for block, own_P in zip(blocks, own.in_columns(blocks, features_GD.device), strict=True):
        block_CD = to_device(rows_RD[block], features_GD.device).float()
        scores_GC = memory[: num_features * len(block_CD)].view(num_features, -1)
        torch.mm(scaled_GD, block_CD.T, out=scores_GC).exp_()
        if len(own_P):
            scores_GC.view(-1).index_fill_(0, own_P, 0)
        sums_GE[:, -1] += scores_GC.sum(dim=1)
        sums_GE[:, :-1].addmm_(scores_GC, block_CD)
        del block_CD  # before the next one is made
    return sums_GE
