"""Threads that work on images beside each other, and the memory that they write to.

Shapes: any.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

_MAX_BUFFERS = 8


def single_threaded_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Return threads in which torch uses no further threads.

    Teams of OpenMP threads that compete with each other and with the training step's wait at every operation.
    """
    before, barrier = torch.get_num_threads(), Barrier(num_threads)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    for future in [pool.submit(start) for _ in range(num_threads)]:
        future.result()
    # Each thread has a number of its own, but threads that start later take the one that was set last.
    torch.set_num_threads(before)
    return pool


class Buffers:
    """Memory of batches that nobody holds any more, used again.

    The kernel clears the pages of new memory one by one: 0.35 ms for the floats of an image of 224 pixels, five times
    what it takes to turn its bytes into them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: list[tuple[Tensor, int]] = []

    def take(self, shape: torch.Size) -> Tensor:
        """Return an uninitialised tensor on the CPU whose memory nobody uses."""
        for buffer, alone in self._kept:
            if buffer.shape == shape and _num_users(buffer) == alone:
                return buffer.view(shape)
        buffer = torch.empty(shape, dtype=self._dtype)
        if len(self._kept) == _MAX_BUFFERS:
            self._kept.pop(0)
        self._kept.append((buffer, _num_users(buffer)))
        return buffer.view(shape)


def _num_users(tensor: Tensor) -> int:
    """Return how many tensors, arrays and graphs hold the tensor's memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]
