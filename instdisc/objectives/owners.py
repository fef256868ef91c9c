"""Sums over rows that differ from sample to sample, taken where the rows are: negatives of each sample, nearest rows.

The paper's released code draws negatives of its own for every sample. Fetching those rows would move G x K x D numbers.
Here every rank learns the features of all, and adds up, over the rows that it owns, what a loss needs of its scores and
the weighted sum of rows that the gradient needs. One reduce-scatter of G x (D+2) numbers brings each rank the sums of
its own samples; neither scores nor rows travel.

Shapes: B samples of this rank, G of all ranks, K negatives of a sample, P pairs of a sample and an owned row, b samples
of one block, n the most pairs of one of them, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import all_gather_rows, reduce_scatter_rows
from dataloading.device_copies import host_memory, to_device
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.objectives.gradients import first_order, require_fixed

BLOCK_BYTES = 2**23
"""Rows that a CPU copies out at a time; more would leave its caches between the two products."""
GPU_BLOCK_BYTES = 2**28
"""The same on a GPU, where a small block is a launch of a kernel that keeps nothing busy."""


@dataclass(frozen=True)
class OwnedPairs:
    """Which of the rows that each sample is compared with this rank owns, by sample."""

    places_P: np.ndarray
    """int64, places in the rank's shard, those of the first sample first."""
    counts_G: np.ndarray
    """int64, pairs of each sample."""

    def block(self, start: int, stop: int, offsets: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return the places of the samples [start, stop), (b, n), and where they are padding, None where nowhere."""
        counts_b = self.counts_G[start:stop]
        most = int(counts_b.max(initial=0))
        places_p = self.places_P[offsets[start] : offsets[stop]]
        if len(places_p) == most * len(counts_b):
            return torch.from_numpy(places_p.reshape(len(counts_b), most)), None
        is_pair_bn = np.arange(most)[None, :] < counts_b[:, None]
        places_bn = np.zeros(is_pair_bn.shape, dtype=np.int64)
        places_bn[is_pair_bn] = places_p
        return torch.from_numpy(places_bn), torch.from_numpy(~is_pair_bn)


def owned_pairs(rows_GK: np.ndarray, bank: ShardedMemoryBank, *, excluded_G: np.ndarray | None = None) -> OwnedPairs:
    """Return this rank's part of the rows that samples are compared with. excluded_G: a row that must not count."""
    if bank.world_size == 1 and excluded_G is None:
        return OwnedPairs(rows_GK.reshape(-1), np.full(len(rows_GK), rows_GK.shape[1]))
    mine_GK = (rows_GK >= bank.start) & (rows_GK < bank.stop)
    if excluded_G is not None:
        mine_GK &= rows_GK != excluded_G[:, None]
    return OwnedPairs(rows_GK[mine_GK] - bank.start, mine_GK.sum(axis=1))


def nce_noise_of_owned(
    features_BD: Tensor,
    pairs: OwnedPairs,
    bank: ShardedMemoryBank,
    *,
    temperature: float,
    offset: Tensor | float,
    counts_W: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return what `nce.noise_terms` returns, float32 (B,) twice, over each sample's own negatives. Collective."""
    require_fixed(rows=bank.rows, temperature=temperature, offset=offset)
    return _SumsOfOwners.apply(  # pyright: ignore
        features_BD.float(), pairs, bank, temperature, counts_W, offset, True
    )


def log_sum_exp_of_owned(
    features_BD: Tensor, pairs: OwnedPairs, bank: ShardedMemoryBank, *, temperature: float, counts_W: Sequence[int]
) -> Tensor:
    """Return what `infonce.log_sum_exp` returns, float32 (B,), over rows of each sample's own. Collective."""
    require_fixed(rows=bank.rows, temperature=temperature)
    _, log_sums_B = _SumsOfOwners.apply(  # pyright: ignore
        features_BD.float(), pairs, bank, temperature, counts_W, 1 / temperature, False
    )
    return log_sums_B


class _SumsOfOwners(torch.autograd.Function):
    """First result: the terms of NCE's noise, sum_k log(1 + e_k) with e_k = exp(s_k - shift), whose gradient is
    sum_k e_k / (1 + e_k) v_k / τ. Second: L = log sum_k exp(s_k), with gradient sum_k exp(s_k - L) v_k / τ.

    One of them is asked for, and has its gradient: each owner's share of the weighted sum of rows travels with its
    terms, so the gradient is ready when the forward pass ends. shift keeps the exponentials in the range of float32:
    the offset of NCE, or the greatest score, 1/τ.
    """

    @staticmethod
    def forward(ctx: Any, features_BD, pairs, bank, temperature, counts_W, shift, of_noise):
        features_GD = all_gather_rows(features_BD.detach(), counts_W, bank.group)
        sums_GE = _sums_over_pairs(features_GD / temperature, pairs, bank.rows, shift, of_noise)
        sums_BE = reduce_scatter_rows(sums_GE, counts_W, bank.group)
        weighted_BD, terms_B, exponentials_B = sums_BE[:, :-2], sums_BE[:, -2], sums_BE[:, -1]
        log_sums_B = exponentials_B.log() + shift
        ctx.of_noise = of_noise
        if of_noise:
            ctx.mark_non_differentiable(log_sums_B)
        else:
            weighted_BD = weighted_BD / exponentials_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            ctx.mark_non_differentiable(terms_B)
        ctx.save_for_backward(weighted_BD / temperature)
        return terms_B.clone(), log_sums_B

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs):
        (gradient_BD,) = ctx.saved_tensors
        grad_B = grad_outputs[0] if ctx.of_noise else grad_outputs[1]
        return grad_B[:, None] * gradient_BD, None, None, None, None, None, None


def _sums_over_pairs(
    scaled_GD: Tensor, pairs: OwnedPairs, rows_RD: Tensor, shift: Tensor | float, of_noise: bool
) -> Tensor:
    """Return of each sample the weighted sum of rows, the terms of NCE's noise, and sum exp(s - shift): (G, D+2).

    scaled_GD: features over τ, float32.
    """
    num_samples, dim = scaled_GD.shape
    sums_GE = scaled_GD.new_zeros(num_samples, dim + 2)
    offsets = np.concatenate([[0], np.cumsum(pairs.counts_G)])
    most = max(1, int(pairs.counts_G.max(initial=0)))
    block_bytes = BLOCK_BYTES if scaled_GD.device.type == "cpu" else GPU_BLOCK_BYTES
    samples = max(1, min(num_samples, block_bytes // (4 * dim * most)))
    copies = _Copies(rows_RD, samples * most, scaled_GD.device)
    for start in range(0, num_samples, samples):
        stop = min(num_samples, start + samples)
        places_bn, padding_bn = pairs.block(start, stop, offsets)
        if places_bn.shape[1] == 0:
            continue
        rows_bnD = copies.of(places_bn.view(-1)).view(*places_bn.shape, dim)
        odds_bn = torch.bmm(rows_bnD, scaled_GD[start:stop, :, None])[:, :, 0]
        if padding_bn is not None:
            odds_bn.masked_fill_(to_device(padding_bn, odds_bn.device), -torch.inf)
        odds_bn.sub_(shift).exp_()
        torch.sum(odds_bn, dim=1, out=sums_GE[start:stop, -1])
        if of_noise:
            torch.sum(torch.log1p(odds_bn), dim=1, out=sums_GE[start:stop, -2])
            odds_bn.div_(odds_bn + 1)
        sums_GE[start:stop, :-2] = torch.bmm(odds_bn[:, None, :], rows_bnD)[:, 0]
    return sums_GE


class _Copies:
    """Copies of rows where they are worked with, float32; memory of the rows' own device is used again."""

    def __init__(self, rows_RD: Tensor, most: int, device: torch.device) -> None:
        self._rows_RD, self._device = rows_RD, device
        self._memory = rows_RD.new_empty((most, rows_RD.shape[1])) if rows_RD.device == device else None

    def of(self, places_p: Tensor) -> Tensor:
        """Return copies of rows, (p, D), which hold until the next call."""
        if self._memory is not None:
            copies_pD = self._memory[: len(places_p)]
        else:
            # Not used again: the copy from it to the device is still under way when the next block is made.
            shape = torch.Size((len(places_p), self._rows_RD.shape[1]))
            copies_pD = host_memory(shape, self._rows_RD.dtype, self._device)
        torch.index_select(self._rows_RD, 0, to_device(places_p, self._rows_RD.device), out=copies_pD)
        return to_device(copies_pD, self._device).float()
