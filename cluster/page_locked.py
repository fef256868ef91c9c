"""Page-locked host memory of exactly the size that is asked for, from and to which a GPU copies without waiting.

torch's own allocator rounds up to a power of two: a bank of 70 GB would lock 128 GB. It also frees nothing while the
process lives, which suits small pieces that come and go; those are left to it.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL_BYTES = 2**20


def page_locked(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return uninitialised page-locked memory; it is unlocked when nobody holds the tensor any more.

    Raises:
        OSError: CUDA cannot lock so much of the machine's memory.
    """
    num_bytes = shape.numel() * dtype.itemsize
    if num_bytes < SMALL_BYTES:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # With small pages, each row of a large bank costs a walk through the page tables; some kernels have no others.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    failure = int(_cuda_runtime().cudaHostRegister(memory.ctypes.data, num_bytes, 0))
    if failure:
        raise OSError(
            f"cannot page-lock {num_bytes / 1e9:.3g} GB of host memory for the GPU (CUDA error {failure}): the machine "
            "has too little memory free, or its limit of locked memory (ulimit -l) is too low. A bank fits into less "
            "with bank.dtype float16, more workers, or bank.device mapped"
        )
    # The array dies with the last tensor that shows it, and before its mapping is gone.
    weakref.finalize(memory, _unlock, memory.ctypes.data).atexit = False
    return torch.from_numpy(memory).view(dtype).view(shape)


def _unlock(address: int) -> None:
    torch.cuda.synchronize()  # copies from or to it may be under way
    _cuda_runtime().cudaHostUnregister(address)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()
