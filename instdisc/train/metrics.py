"""What a run shows of its steps: sums on the device between reads, one small exchange per read.

Shapes: G samples of all ranks, b of one group, D feature numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = ("loss", "positive_score", "negative_score")


class StepSums:
    """This rank's shares of the global means, summed over the steps since the last read."""

    def __init__(self, device: torch.device) -> None:
        self._values = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        self.num_steps = 0

    @torch.no_grad()
    def add_group(
        self,
        loss: Tensor,
        features_bD: Tensor,
        positives_GD: Tensor,
        group: slice,
        valid_G: Tensor,
        num_valid: int,
    ) -> None:
        """Count one group: its share of the loss, and its cosines with its own rows and with the batch's other rows."""
        self._values[0] += loss.detach()
        if group.start == group.stop:
            return
        # Rows of the other samples are rows of random other images: the same measure for every objective.
        features_bD = features_bD.detach()
        own_b = (features_bD * positives_GD[group]).sum(dim=1)
        others_b = features_bD @ positives_GD.sum(dim=0) - own_b
        valid_b = valid_G[group].to(own_b.device, torch.float32, non_blocking=True)
        counted = max(1, num_valid)
        self._values[1] += torch.dot(own_b, valid_b) / counted
        self._values[2] += torch.dot(others_b, valid_b) / (counted * max(1, len(positives_GD) - 1))

    def read(self) -> dict[str, float]:
        """Return this rank's shares of the means per step and start anew. Waits for the device."""
        shares = (self._values / max(1, self.num_steps)).tolist()
        self._values, self.num_steps = torch.zeros_like(self._values), 0
        return dict(zip(NAMES, shares, strict=True))


class NonFiniteError(RuntimeError):
    """Training met a value that is not finite and stopped before anything of it was saved."""


def check_finite(by_rank: Sequence[dict[str, Any]], steps: tuple[int, int]) -> None:
    """Raise NonFiniteError naming ranks and step where features or loss of any rank were not finite.

    by_rank: what each rank read, with "non_finite_step" (-1 where all was well) and "loss" (None where not finite).
    """
    for rank, read in enumerate(by_rank):
        if read["non_finite_step"] >= 0 or read["loss"] is None:
            where = (
                f"step {read['non_finite_step']}" if read["non_finite_step"] >= 0 else f"steps {steps[0]} to {steps[1]}"
            )
            raise NonFiniteError(
                f"rank {rank}, {where}: found features or a loss that are not finite, expected finite numbers. Nothing "
                "of it was saved: the same command goes on from the last checkpoint. A lower optim.lr or "
                "system.precision=float32 usually helps."
            )


def finite_or_none(value: float) -> float | None:
    """Return the value, None where JSON could not carry it."""
    return value if math.isfinite(value) else None
