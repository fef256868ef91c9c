"""The alternative's memory bank: one dense tensor, replicated where there are several processes, in plain PyTorch.

It computes what the released code of arXiv 1805.01978 computes, in today's PyTorch. Nothing in it is slow on purpose:
no host synchronisation, negatives drawn on the device, log-space losses.

Shapes: B samples, N rows, K negatives, L = K + 1, D feature numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from instdisc.config_method import ObjectiveConfig


class PlainBank:
    """A dense bank with the paper's three objectives.

    rows_ND: float32, changed in place. negatives: "shared" by the batch (one matrix product), or "per-sample" as in the
    released code (gather, then bmm). kept_memory: per-sample rows are gathered into memory that is used again.
    """

    def __init__(
        self, rows_ND: Tensor, config: ObjectiveConfig, *, momentum: float, negatives: str, kept_memory: bool = False
    ) -> None:
        self.rows_ND, self._config, self._momentum, self._negatives = rows_ND, config, momentum, negatives
        self._kept: Tensor | None = rows_ND.new_empty(0) if kept_memory else None
        self.z: Tensor | None = None

    def loss(self, features_BD: Tensor, indices_B: Tensor) -> Tensor:
        """Return the mean loss of a batch, a float32 scalar; indices_B on the bank's device."""
        temperature = self._config.temperature
        if self._config.name == "softmax":
            return F.cross_entropy(features_BD @ self.rows_ND.T / temperature, indices_B)
        positive_B1, negative_BK, same_BK = self.scores(features_BD, indices_B, *self.gather(indices_B))
        return self.loss_of_scores(positive_B1, negative_BK, same_BK)

    def gather(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draw negatives; return the rows of positives and negatives, and their row numbers.

        Per-sample (B, L, D) and (B, L), column 0 the positive, as in lib/NCEAverage.py of the released code; shared
        (B+K, D) and (B+K,), the positives first.
        """
        num_rows, num_negatives = len(self.rows_ND), self._config.num_negatives
        device = self.rows_ND.device
        if self._negatives == "shared":
            indices = torch.cat([indices_B, torch.randint(num_rows, (num_negatives,), device=device)])
            return self.rows_ND.index_select(0, indices), indices
        indices_BL = torch.randint(num_rows, (len(indices_B), num_negatives + 1), device=device)
        indices_BL[:, 0] = indices_B
        if self._kept is None:
            rows = self.rows_ND.index_select(0, indices_BL.view(-1))
        else:
            self._kept.resize_(indices_BL.numel(), self.rows_ND.shape[1])
            rows = torch.index_select(self.rows_ND, 0, indices_BL.view(-1), out=self._kept)
        return rows.view(*indices_BL.shape, -1), indices_BL

    def scores(
        self, features_BD: Tensor, indices_B: Tensor, rows: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of the positives (B, 1) and of the negatives (B, K), and where a negative is the positive."""
        temperature = self._config.temperature
        if self._negatives == "shared":
            at = len(indices_B)
            positive_B1 = (features_BD * rows[:at]).sum(dim=1, keepdim=True)
            return (
                positive_B1 / temperature,
                features_BD @ rows[at:].T / temperature,
                indices_B[:, None] == indices[at:],
            )
        scores_BL = torch.bmm(rows, features_BD[:, :, None])[:, :, 0] / temperature
        return scores_BL[:, :1], scores_BL[:, 1:], indices[:, 1:] == indices_B[:, None]

    def loss_of_scores(self, positive_B1: Tensor, negative_BK: Tensor, same_BK: Tensor) -> Tensor:
        """Return the mean loss from the scores: InfoNCE, or NCE with the Z of the first batch."""
        if self._config.name == "infonce":
            scores_BL = torch.cat([positive_B1, negative_BK.masked_fill(same_BK, -math.inf)], dim=1)
            return F.cross_entropy(scores_BL, same_BK.new_zeros(len(scores_BL), dtype=torch.int64))
        num_rows = len(self.rows_ND)
        if self.z is None:
            self.z = negative_BK.detach().exp().mean() * num_rows
        # log of the odds of data against noise, P(i|v) / (m Pn) with P = exp(s) / Z and Pn = 1 / N (section 3.2).
        shift = self.z.log() + math.log(negative_BK.shape[1] / num_rows)
        positive_loss = F.softplus(shift - positive_B1).sum()
        return (positive_loss + F.softplus(negative_BK - shift).sum()) / len(positive_B1)

    @torch.no_grad()
    def update(self, indices_B: Tensor, features_BD: Tensor) -> None:
        """Write the features of a batch."""
        mixed_BD = self._momentum * self.rows_ND.index_select(0, indices_B) + (1 - self._momentum) * features_BD
        self.rows_ND.index_copy_(0, indices_B, F.normalize(mixed_BD, dim=1))
