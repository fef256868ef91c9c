"""BatchNorm that does not depend on the number of workers.

Batch statistics are taken over groups of consecutive positions of the global batch, one forward pass per group, and
the running statistics move once per step, by the average over the groups of all ranks:

    running <- (1 - momentum) * running + momentum * mean over groups of (the group's statistics)

To see each group's statistics, the modules run with momentum 1, so that their buffers hold those of the last group. The
running ones, which only evaluation needs, stand beside them: their exchange has until the next step to arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.collectives import Group, PendingSum, start_all_reduce_sum


class GroupedBatchNorm:
    """Keeps the running statistics of all BatchNorm modules of an encoder through a step of several groups."""

    def __init__(self, encoder: nn.Module, group: Group = None) -> None:
        self._modules = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._momenta = [0.1 if m.momentum is None else m.momentum for m in self._modules]
        self._group = group
        for module in self._modules:
            module.momentum = 1.0
        self._exchange: PendingSum | None = None
        self._running = [buffer.clone() for buffer in self._buffers()]
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers()]

    def load_running(self) -> None:
        """Take the buffers as they stand (start, restore) for the running statistics."""
        if self._modules:
            torch._foreach_copy_(self._running, self._buffers())  # pyright: ignore[reportPrivateImportUsage]

    def add_group(self) -> None:
        """Count the statistics of the group that was just embedded."""
        if self._modules:
            torch._foreach_add_(self._sums, self._buffers())  # pyright: ignore[reportPrivateImportUsage]

    def discard(self) -> None:
        """Forget the groups seen since the last step."""
        if self._modules:
            torch._foreach_zero_(self._sums)  # pyright: ignore[reportPrivateImportUsage]

    def start_exchange(self) -> None:
        """Start adding up the ranks' statistics, once all groups of the step are embedded. Collective."""
        if self._modules:
            self._exchange = start_all_reduce_sum(torch.cat([s.flatten() for s in self._sums]), self._group)
            self.discard()

    def finish_step(self, num_groups: int) -> None:
        """Move the running statistics by the average over the groups of all ranks, once their sum is here."""
        if self._exchange is None:
            return
        sums = self._exchange.wait()
        self._exchange = None
        means = torch.split(sums / num_groups, [s.numel() for s in self._sums])
        for i, (running, mean) in enumerate(zip(self._running, means, strict=True)):
            running.lerp_(mean.view_as(running), self._momenta[i // 2])

    def put_back(self, step: int) -> None:
        """Put the running statistics into the modules' buffers, as they are after `step` steps, to evaluate or save."""
        if self._modules:
            torch._foreach_copy_(self._buffers(), self._running)  # pyright: ignore[reportPrivateImportUsage]
        for module in self._modules:
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(step)

    def _buffers(self) -> list[Tensor]:
        return [b for m in self._modules for b in (m.running_mean, m.running_var) if b is not None]
