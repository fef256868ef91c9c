"""Copies from host memory to a GPU for which the host does not wait.

A copy from pageable memory blocks the host, `non_blocking` or not: CUDA stages it, and may first wait for everything
that the device has been given. Page-locked memory from torch's allocator is handed out again only when the copies from
it are done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device: by way of page-locked memory to a GPU, itself where it is there."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    locked = tensor if tensor.is_pinned() else tensor.pin_memory()
    return locked.to(device, non_blocking=True)


def host_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory of the host from which `to_device` copies without a detour."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
