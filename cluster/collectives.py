"""Collectives over rows: what the memory bank and the objectives need of torch.distributed, for any number of ranks.

Ranks may bring different numbers of rows; what each brings is known on the host (`counts_W`), so nothing here waits
for a device, unless a group has NCCL alone: then what lies on the host travels by way of the GPU. Without
torch.distributed, or with one rank, every function is the identity and copies nothing.

Shapes: B rows of this rank, G rows of all ranks, W ranks, X anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, or None for the default group


def world_size(group: Group = None) -> int:
    """Return the number of ranks of `group`, 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """Return this process's rank in `group`, 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather_counts(count: int, group: Group = None) -> list[int]:
    """Return how many rows each rank brings, in rank order. Collective, on CPU tensors: no device is waited for."""
    return all_gather_rows(torch.tensor([count]), [1] * world_size(group), group).tolist()


def _carrier(device: torch.device, group: Group) -> torch.device:
    """Return where tensors of a device must lie to travel in a group: on the GPU in one that has NCCL alone."""
    if device.type == "cpu" and "cpu" not in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass
class PendingRows:
    """An all-gather of rows on its way; `wait` returns it, once the transport is done."""

    _gathered_WMX: Tensor
    _counts_W: Sequence[int]
    _work: Any
    _home: torch.device | None = None
    """Where the rows belong, if they travelled by way of another device."""

    def wait(self) -> Tensor:
        """Return the rows of all ranks in rank order, (G, X)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._home is not None:
            self._gathered_WMX, self._home = self._gathered_WMX.to(self._home), None
        most = self._gathered_WMX.shape[1]
        if all(count == most for count in self._counts_W):
            return self._gathered_WMX.flatten(0, 1)
        return torch.cat([rows_MX[:count] for rows_MX, count in zip(self._gathered_WMX, self._counts_W, strict=True)])


def start_all_gather_rows(rows_BX: Tensor, counts_W: Sequence[int], group: Group = None) -> PendingRows:
    """Start the all-gather of each rank's rows; ranks with fewer rows than the most send padding. Collective."""
    size = world_size(group)
    if size == 1:
        return PendingRows(rows_BX[None], counts_W, None)
    most = max(counts_W)
    padded_MX = rows_BX.contiguous()
    if len(rows_BX) < most:
        padded_MX = rows_BX.new_zeros((most, *rows_BX.shape[1:]))
        padded_MX[: len(rows_BX)] = rows_BX
    home = padded_MX.device
    padded_MX = padded_MX.to(_carrier(home, group))
    gathered_WMX = padded_MX.new_empty((size, *padded_MX.shape))
    if most == 0:
        return PendingRows(gathered_WMX, counts_W, None, home)
    work = dist.all_gather_into_tensor(gathered_WMX.flatten(0, 1), padded_MX, group=group, async_op=True)
    return PendingRows(gathered_WMX, counts_W, work, home)


def all_gather_rows(rows_BX: Tensor, counts_W: Sequence[int], group: Group = None) -> Tensor:
    """Return the rows of all ranks in rank order, (G, X). Collective."""
    return start_all_gather_rows(rows_BX, counts_W, group).wait()


@dataclass
class PendingSum:
    """A sum over the ranks on its way."""

    _tensor: Tensor
    _work: Any
    _carried: Tensor | None = None
    """The tensor on its way, where it travels by way of another device."""

    def wait(self) -> Tensor:
        """Return the sum, in the tensor that was given."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._carried is not None:
                self._tensor.copy_(self._carried)
        return self._tensor


def start_all_reduce_sum(tensor: Tensor, group: Group = None) -> PendingSum:
    """Start summing `tensor` over the ranks in place. Collective."""
    if world_size(group) == 1:
        return PendingSum(tensor, None)
    carried = tensor.to(_carrier(tensor.device, group))
    work = dist.all_reduce(carried, group=group, async_op=True)
    return PendingSum(tensor, work, None if carried is tensor else carried)


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum `tensor` over the ranks in place and return it. Collective."""
    return start_all_reduce_sum(tensor, group).wait()


def reduce_scatter_rows(rows_GX: Tensor, counts_W: Sequence[int], group: Group = None) -> Tensor:
    """Sum (G, X) over the ranks and return the rows that this rank brought, (B, X). Collective."""
    size = world_size(group)
    if size == 1:
        return rows_GX
    most = max(counts_W)
    me = rank(group)
    if most == 0:
        return rows_GX
    home = rows_GX.device
    rows_GX = rows_GX.to(_carrier(home, group))
    padded_WMX = rows_GX.new_zeros((size, most, *rows_GX.shape[1:]))
    for rows_MX, part_BX in zip(padded_WMX, rows_GX.split(list(counts_W)), strict=True):
        rows_MX[: len(part_BX)] = part_BX
    own_MX = padded_WMX.new_empty(padded_WMX.shape[1:])
    dist.reduce_scatter_tensor(own_MX, padded_WMX.flatten(0, 1), group=group)
    return own_MX[: counts_W[me]].to(home)
