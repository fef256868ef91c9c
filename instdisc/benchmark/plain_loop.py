"""The alternative of `bench step`: the paper's training step as one would write it in plain PyTorch for one process.

It is what the released code of arXiv 1805.01978 computes, in today's PyTorch: a dense bank as one tensor, the bank
update by `index_copy_` after the backward pass, and three objectives. Nothing in it is slow on purpose: no host
synchronisation, negatives drawn on the device, log-space losses.

Shapes: B samples, N rows, K negatives, D feature numbers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloading.loader import Batch
from instdisc.config import TrainConfig
from instdisc.memory_bank import start_rows
from instdisc.models import build_encoder

NEGATIVES = ("shared", "per-sample")


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """The settings of the plain loop that a user would try."""

    channels_last: bool = False
    optimizer: str = "foreach"
    """"loop", "foreach" or "fused": the three implementations of torch.optim.SGD."""
    compile: bool = False
    """torch.compile of the encoder."""
    negatives: str = "shared"
    """"shared" by the batch (one matrix product), or "per-sample" as in the released code (gather, then bmm)."""

    @property
    def name(self) -> str:
        """The settings in words."""
        layout = "channels_last" if self.channels_last else "channels first"
        return f"{layout}, SGD {self.optimizer}, {'torch.compile' if self.compile else 'eager'}"


def plain_settings(negatives: str, *, with_compile: bool) -> list[PlainSettings]:
    """Return the settings that the sweep tries."""
    eager = [
        PlainSettings(channels_last=channels_last, optimizer=optimizer, negatives=negatives)
        for channels_last, optimizer in itertools.product((False, True), ("loop", "foreach", "fused"))
    ]
    # The optimizer takes a few percent of a step and compiling takes a minute: compiled code is tried with one.
    compiled = [
        PlainSettings(channels_last=channels_last, optimizer="fused", compile=True, negatives=negatives)
        for channels_last in (False, True)
    ]
    return eager + (compiled if with_compile else [])


class PlainLoop:
    """A single-process training loop over a dense bank; the same network, bank start and constants as ours."""

    def __init__(self, config: TrainConfig, num_rows: int, settings: PlainSettings, device: torch.device) -> None:
        self.config, self.settings, self.num_rows, self.device = config, settings, num_rows, device
        self.encoder = build_encoder(config.model, config.seed).to(device)
        if settings.channels_last:
            self.encoder = self.encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._embed = torch.compile(self.encoder) if settings.compile else self.encoder
        optim = config.optim
        self.optimizer = torch.optim.SGD(
            self.encoder.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
            foreach=settings.optimizer == "foreach",
            fused=settings.optimizer == "fused",
        )
        self.bank_ND = start_rows(num_rows, config.model.feature_dim, config.seed, 0, num_rows).to(device)
        self.z: Tensor | None = None
        self._loss_sum = torch.zeros((), device=device)
        self._num_steps = 0

    def step(self, batch: Batch) -> None:
        """Train on one batch and write its features into the bank."""
        images_BCHW = batch.images_BCHW
        if self.settings.channels_last:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        indices_B = batch.indices_B.to(self.device, non_blocking=True)
        features_BD = self._embed(images_BCHW)
        loss = self._loss(features_BD, indices_B)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            momentum = self.config.bank.momentum
            mixed_BD = momentum * self.bank_ND.index_select(0, indices_B) + (1 - momentum) * features_BD
            self.bank_ND.index_copy_(0, indices_B, F.normalize(mixed_BD, dim=1))
            self._loss_sum += loss.detach()
        self._num_steps += 1

    def mean_loss(self) -> float:
        """Return the mean loss of the steps so far."""
        return float(self._loss_sum) / max(1, self._num_steps)

    def _loss(self, features_BD: Tensor, indices_B: Tensor) -> Tensor:
        temperature = self.config.objective.temperature
        if self.config.objective.name == "softmax":
            return F.cross_entropy(features_BD @ self.bank_ND.T / temperature, indices_B)
        positive_B1, negative_BK, same_BK = self._scores(features_BD, indices_B)
        if self.config.objective.name == "infonce":
            negative_BK = negative_BK.masked_fill(same_BK, -math.inf)
            scores_BL = torch.cat([positive_B1, negative_BK], dim=1)
            return F.cross_entropy(scores_BL, torch.zeros_like(indices_B))
        if self.z is None:
            self.z = negative_BK.detach().exp().mean() * self.num_rows
        # log of the odds of data against noise, P(i|v) / (m Pn) with P = exp(s) / Z and Pn = 1 / N (section 3.2).
        shift = self.z.log() + math.log(negative_BK.shape[1] / self.num_rows)
        positive_loss = F.softplus(shift - positive_B1).sum()
        return (positive_loss + F.softplus(negative_BK - shift).sum()) / len(features_BD)

    def _scores(self, features_BD: Tensor, indices_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of the positives (B, 1) and of the negatives (B, K), and where a negative is the positive."""
        num_samples, num_negatives = len(features_BD), self.config.objective.num_negatives
        temperature = self.config.objective.temperature
        if self.settings.negatives == "shared":
            indices_K = torch.randint(self.num_rows, (num_negatives,), device=self.device)
            positive_B1 = (features_BD * self.bank_ND.index_select(0, indices_B)).sum(dim=1, keepdim=True)
            negative_BK = features_BD @ self.bank_ND.index_select(0, indices_K).T
            return positive_B1 / temperature, negative_BK / temperature, indices_B[:, None] == indices_K
        # Column 0 is the positive, as in lib/NCEAverage.py of the released code.
        indices_BL = torch.randint(self.num_rows, (num_samples, num_negatives + 1), device=self.device)
        indices_BL[:, 0] = indices_B
        rows_BLD = self.bank_ND.index_select(0, indices_BL.view(-1)).view(num_samples, num_negatives + 1, -1)
        scores_BL = torch.bmm(rows_BLD, features_BD[:, :, None])[:, :, 0] / temperature
        return scores_BL[:, :1], scores_BL[:, 1:], indices_BL[:, 1:] == indices_B[:, None]
