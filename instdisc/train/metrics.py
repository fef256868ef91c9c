"""What a run shows of its steps: sums on the device between reads, one small exchange per read.

Shapes: G samples of all ranks, B of this rank, D feature numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataloading.device_copies import to_device
from instdisc.bank_update import GlobalBatch
from instdisc.train.bank_health import DeadBankError

NAMES = ("loss", "positive_score", "negative_score")


class StepSums:
    """This rank's shares of the global means, summed over the steps since the last read."""

    def __init__(self, device: torch.device) -> None:
        self._values = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        self.num_steps = 0

    @torch.no_grad()
    def add_step(
        self, losses_B: Tensor, features_BD: Tensor, positives_GD: Tensor, own: slice, batch: GlobalBatch
    ) -> None:
        """Count a step: this rank's losses, its features' cosines with their own rows and with the batch's others."""
        self.num_steps += 1
        if own.start == own.stop:
            return
        valid_B = to_device(batch.valid_G[own], losses_B.device).float()
        num_valid = max(1, batch.num_valid)
        # Rows of the other samples are rows of random other images: the same measure for every objective.
        own_B = (features_BD * positives_GD[own]).sum(dim=1)
        others_B = features_BD @ positives_GD.sum(dim=0) - own_B
        self._values[0] += torch.where(valid_B > 0, losses_B, 0).sum() / num_valid
        self._values[1] += torch.dot(own_B, valid_B) / num_valid
        self._values[2] += torch.dot(others_B, valid_B) / (num_valid * max(1, len(positives_GD) - 1))

    def read(self) -> dict[str, float]:
        """Return this rank's shares of the means per step and start anew. Waits for the device."""
        shares = (self._values / max(1, self.num_steps)).tolist()
        self._values, self.num_steps = torch.zeros_like(self._values), 0
        return dict(zip(NAMES, shares, strict=True))


class NonFiniteError(RuntimeError):
    """Training met a value that is not finite and stopped before anything of it was saved."""


def check_finite(by_rank: Sequence[dict[str, Any]], steps: tuple[int, int]) -> None:
    """Raise NonFiniteError naming rank and step where features or loss of any rank were first not finite.

    by_rank: what each rank read, with "non_finite_step" (-1 where all was well) and "loss" (None where not finite).
    """
    known = [(read["non_finite_step"], rank) for rank, read in enumerate(by_rank) if read["non_finite_step"] >= 0]
    lossless = [rank for rank, read in enumerate(by_rank) if read["loss"] is None]
    if not known and not lossless:
        return
    # Gradients carry to all ranks what began on one: the earliest step tells where.
    where = "rank {1}, step {0}".format(*min(known)) if known else f"rank {lossless[0]}, steps {steps[0]} to {steps[1]}"
    raise NonFiniteError(
        f"{where}: found features or a loss that are not finite, expected finite numbers. Nothing of it was saved: the "
        "same command goes on from the last checkpoint. A lower optim.lr or system.precision=float32 usually helps."
    )


def check_collapse(by_rank: Sequence[dict[str, Any]]) -> None:
    """Raise DeadBankError naming the step in which all images of a batch had one and the same feature.

    by_rank: what each rank read, with "all_same_step", -1 where all was well.
    """
    for rank, read in enumerate(by_rank):
        if read["all_same_step"] >= 0:
            raise DeadBankError(
                f"rank {rank}, step {read['all_same_step']}: found one feature for all images of the batch, expected "
                "different ones. Nothing of it was written into the memory bank or saved. The encoder has collapsed, "
                "or all images are the same; a lower optim.lr or a longer warm-up usually helps"
            )


def finite_or_none(value: float) -> float | None:
    """Return the value, None where JSON could not carry it."""
    return value if math.isfinite(value) else None
