"""The alternative of `bench step`: the paper's training step as one would write it in plain PyTorch for one process.

Network, optimizer and `PlainBank`, whose rows are written after the backward pass.

Shapes: B samples, N rows, D feature numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from dataloading.loader import Batch
from instdisc.bank_storage import start_rows
from instdisc.benchmark.plain_bank import PlainBank
from instdisc.config import TrainConfig
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
        self.bank = PlainBank(
            start_rows(num_rows, config.model.feature_dim, config.seed, 0, num_rows).to(device),
            config.objective,
            momentum=config.bank.momentum,
            negatives=settings.negatives,
        )
        self._loss_sum = torch.zeros((), device=device)
        self._num_steps = 0

    def step(self, batch: Batch) -> None:
        """Train on one batch and write its features into the bank."""
        images_BCHW = batch.images_BCHW
        if self.settings.channels_last:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        indices_B = batch.indices_B.to(self.device, non_blocking=True)
        features_BD = self._embed(images_BCHW)
        loss = self.bank.loss(features_BD, indices_B)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.bank.update(indices_B, features_BD.detach())
        self._loss_sum += loss.detach()
        self._num_steps += 1

    def mean_loss(self) -> float:
        """Return the mean loss of the steps so far."""
        return float(self._loss_sum) / max(1, self._num_steps)
