"""From decoded crops to the images that the network gets: floats, colours, normalisation.

On a CPU this costs nearly as much as decoding, so it runs in threads, a batch ahead of the one that is trained on; each
thread works off a few images at a time with everything in its caches. On a GPU it runs there.

Shapes: M windows, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Barrier
from typing import Protocol

import torch
from torch import Tensor

from dataloading.augment import AugmentConfig
from dataloading.color import CPU_PART_ELEMENTS, augment_colors, normalize
from dataloading.plan import Plan

_MAX_BUFFERS = 8
_BATCHES_AHEAD = 1


class Finish(Protocol):
    """What becomes of the crops of some windows."""

    def __call__(self, crops_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        """Change the crops of `windows`, float32 in [0, 1], in place."""
        ...


@dataclass(frozen=True)
class Augmented:
    """Colour augmentation as planned, and normalisation."""

    augment: AugmentConfig

    def __call__(self, crops_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        assert plan.factors is not None
        augment_colors(crops_MCSS, plan.factors[windows], self.augment)


@dataclass(frozen=True)
class Normalized:
    """Normalisation alone."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, crops_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        normalize(crops_MCSS, self.mean, self.std)


@dataclass(frozen=True)
class Reference:
    """Colour augmentation by torchvision's own functions, and normalisation."""

    augment: AugmentConfig

    def __call__(self, crops_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        from dataloading.torch_loader import reference_colors

        assert plan.factors is not None
        crops_MCSS.copy_(reference_colors(crops_MCSS, plan.factors[windows], self.augment))


class Finisher:
    """Finishes batches of crops, in threads if they lie on a CPU as bytes. Made once per loader."""

    def __init__(self, finish: Finish, num_threads: int) -> None:
        self._finish, self._num_threads = finish, num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._buffers = _Buffers()

    def images(self, batches: Iterator[tuple[Plan, Tensor]]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield the plans with finished images, float32 (M, C, S, S), in order.

        batches: plans with crops, float32 in [0, 1] or uint8, (M, C, S, S).
        """
        waiting: deque[tuple[Plan, Tensor, list[Future[None]]]] = deque()
        for plan, crops_MCSS in batches:
            waiting.append((plan, *self._start(plan, crops_MCSS)))
            # Whoever made floats (from memory, at once) has nothing that could go on meanwhile.
            while waiting and len(waiting) > (_BATCHES_AHEAD if waiting[0][2] else 0):
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _start(self, plan: Plan, crops_MCSS: Tensor) -> tuple[Tensor, list[Future[None]]]:
        if crops_MCSS.dtype != torch.uint8:
            self._finish(crops_MCSS, plan, slice(0, len(crops_MCSS)))
            return crops_MCSS, []
        if crops_MCSS.device.type != "cpu":
            images_MCSS = crops_MCSS.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
            self._finish(images_MCSS, plan, slice(0, len(images_MCSS)))
            return images_MCSS, []
        if self._pool is None:
            self._pool = _single_threaded_pool(self._num_threads)
        images_MCSS = self._buffers.take(crops_MCSS.shape)
        cuts = [len(images_MCSS) * part // self._num_threads for part in range(self._num_threads + 1)]
        shares = [range(start, stop) for start, stop in pairwise(cuts) if start < stop]
        return images_MCSS, [self._pool.submit(self._share, images_MCSS, crops_MCSS, plan, share) for share in shares]

    def _share(self, images_MCSS: Tensor, crops_MCSS: Tensor, plan: Plan, share: range) -> None:
        """Finish a thread's share of a batch, a few images at a time."""
        size = max(1, CPU_PART_ELEMENTS // images_MCSS[0].numel())
        for start in share[::size]:
            part = slice(start, min(start + size, share.stop))
            images = images_MCSS[part]
            images.copy_(crops_MCSS[part]).div_(255.0)
            self._finish(images, plan, part)


def _done(plan: Plan, images_MCSS: Tensor, futures: list[Future[None]]) -> tuple[Plan, Tensor]:
    for future in futures:
        future.result()
    return plan, images_MCSS


def _single_threaded_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return threads in which torch uses no further threads.

    Teams of OpenMP threads that compete with the decoder's wait for each other at every operation.
    """
    before, barrier = torch.get_num_threads(), Barrier(num_threads)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="finish-images")
    for future in [pool.submit(start) for _ in range(num_threads)]:
        future.result()
    # Each thread has a number of its own, but threads that start later take the one that was set last.
    torch.set_num_threads(before)
    return pool


class _Buffers:
    """Memory of batches that nobody holds any more, used again.

    The kernel clears the pages of new memory one by one: 0.35 ms an image of 224 pixels, five times what it takes to
    turn its bytes into floats.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, int]] = []

    def take(self, shape: torch.Size) -> Tensor:
        """Return an uninitialised float32 tensor on the CPU whose memory nobody uses."""
        for buffer, alone in self._kept:
            if buffer.shape == shape and _num_users(buffer) == alone:
                return buffer.view(shape)
        buffer = torch.empty(shape)
        if len(self._kept) == _MAX_BUFFERS:
            self._kept.pop(0)
        self._kept.append((buffer, _num_users(buffer)))
        return buffer.view(shape)


def _num_users(tensor: Tensor) -> int:
    """Return how many tensors, arrays and graphs hold the tensor's memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]
