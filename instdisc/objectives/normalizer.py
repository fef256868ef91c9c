"""Z, the normaliser of NCE: estimated once from the first batch, or followed as the features change.

The paper takes the estimate of the first batches as a constant (arXiv 1805.01978, section 3.2). It holds for a bank of
random vectors; as rows come to hold a young network's features, the true Z grows, and on small data sets the loss with
the constant grows without end. Both values are kept, so that a run can show how far they are apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.collectives import Group, PendingSum, start_all_reduce_sum


class Normalizer:
    """log Z in use and its running estimate, float64 scalars on the device of the scores.

    kind: "constant" or "ema". decay: of the running mean of Z. num_rows: N. temperature: τ.
    """

    def __init__(
        self, *, kind: str, decay: float, num_rows: int, temperature: float, device: torch.device, group: Group = None
    ) -> None:
        self._kind, self._decay, self._group = kind, decay, group
        self._log_num_rows, self._shift = math.log(num_rows), 1 / temperature
        # Until a batch has told, scores count as 0: a first batch of damaged images has no estimate.
        self._constant = torch.full((), self._log_num_rows, dtype=torch.float64, device=device)
        self._running = self._constant.clone()
        self.started = False

    @property
    def log_z(self) -> Tensor:
        """log Z that the loss uses, a float32 scalar."""
        return (self._constant if self._kind == "constant" else self._running).float()

    @property
    def running_log_z(self) -> Tensor:
        """log of the running estimate of Z, a float32 scalar."""
        return self._running.float()

    def observe(self, scores: Sequence[Tensor], num_scores: int) -> None:
        """Take in a step's scores as `start_observation` and `finish` do, at once. Collective."""
        self.finish(self.start_observation(scores), num_scores)

    def start_observation(self, scores: Sequence[Tensor]) -> PendingSum:
        """Start adding up exp(v_k.v / τ) over the scores of all ranks. Collective.

        scores: v_k.v / τ of this rank, any shapes, or logs of sums of their exponentials.
        """
        # Scores of unit vectors are at most 1/τ, so with that shift no exponential overflows on any rank.
        total = torch.zeros((), dtype=torch.float64, device=self._running.device)
        for part in scores:
            # The exponential in float64: at small τ it is below the least float32.
            total += (torch.logsumexp(part.flatten(), dim=0).double() - self._shift).exp()
        return start_all_reduce_sum(total, self._group)

    def finish(self, observation: PendingSum, num_scores: int) -> None:
        """Take in an observation. num_scores: of all ranks together.

        Z is N times the mean of exp(v_k.v / τ) over the samples and negatives of all ranks (section 3.2). The first
        one sets it, so it comes before the first loss; later ones move the running estimate.
        """
        total = observation.wait()
        if num_scores == 0:
            return  # a batch of damaged images alone says nothing of Z
        estimate = self._log_num_rows + self._shift + torch.log(total / num_scores)
        if not self.started:
            self._constant, self._running, self.started = estimate, estimate.clone(), True
            return
        mixed = self._decay * (self._running - estimate).exp() + (1 - self._decay)
        self._running = estimate + torch.log(mixed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers that JSON keeps exactly."""
        return {
            "started": self.started,
            "log_z_constant": self._constant.item() if self.started else None,
            "log_z_running": self._running.item() if self.started else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.started = state["started"]
        self._constant.fill_(state["log_z_constant"] if self.started else self._log_num_rows)
        self._running.fill_(state["log_z_running"] if self.started else self._log_num_rows)
