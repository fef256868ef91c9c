"""From decoded crops to the images that the network gets: floats, colours, normalisation.

On a CPU it runs in threads, a batch ahead of the one that is trained on; each thread takes its share of a batch in one
call without Python's lock. On a GPU it runs there.

Shapes: M windows, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dataloading.augment import AugmentConfig
from dataloading.color import augment_colors, normalize
from dataloading.plan import Plan
from dataloading.threads import Buffers, single_threaded_pool

_BATCHES_AHEAD = 1


class Finish(Protocol):
    """What becomes of the crops of some windows."""

    def __call__(self, crops_MCSS: Tensor, images_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        """Write finished images, float32, contiguous, of the crops of `windows`.

        crops_MCSS: uint8, or float32 in [0, 1] and then the same tensor as images_MCSS.
        """
        ...


@dataclass(frozen=True)
class Augmented:
    """Colour augmentation as planned, and normalisation."""

    augment: AugmentConfig

    def __call__(self, crops_MCSS: Tensor, images_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        assert plan.factors is not None
        augment_colors(crops_MCSS, plan.factors[windows], self.augment, images_MCSS)


@dataclass(frozen=True)
class Normalized:
    """Normalisation alone."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, crops_MCSS: Tensor, images_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        normalize(crops_MCSS, self.mean, self.std, images_MCSS)


@dataclass(frozen=True)
class Reference:
    """Colour augmentation by torchvision's own functions, and normalisation."""

    augment: AugmentConfig

    def __call__(self, crops_MCSS: Tensor, images_MCSS: Tensor, plan: Plan, windows: slice) -> None:
        from dataloading.torch_loader import reference_colors

        assert plan.factors is not None
        floats_MCSS = crops_MCSS if crops_MCSS.dtype == torch.float32 else crops_MCSS.to(torch.float32).div_(255.0)
        images_MCSS.copy_(reference_colors(floats_MCSS, plan.factors[windows], self.augment))


class Finisher:
    """Finishes batches of crops, in threads if they lie on a CPU as bytes. Made once per loader."""

    def __init__(self, finish: Finish, num_threads: int) -> None:
        self._finish, self._num_threads = finish, num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._buffers = Buffers(torch.float32)

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
        everything = slice(0, len(crops_MCSS))
        if crops_MCSS.dtype != torch.uint8:
            self._finish(crops_MCSS, crops_MCSS, plan, everything)
            return crops_MCSS, []
        if crops_MCSS.device.type != "cpu":
            images_MCSS = torch.empty(crops_MCSS.shape, device=crops_MCSS.device)
            self._finish(crops_MCSS, images_MCSS, plan, everything)
            return images_MCSS, []
        if self._pool is None:
            self._pool = single_threaded_pool(self._num_threads, "finish-images")
        images_MCSS = self._buffers.take(crops_MCSS.shape)
        cuts = [len(images_MCSS) * part // self._num_threads for part in range(self._num_threads + 1)]
        shares = [slice(start, stop) for start, stop in pairwise(cuts) if start < stop]
        submit = self._pool.submit
        futures = [submit(self._finish, crops_MCSS[share], images_MCSS[share], plan, share) for share in shares]
        return images_MCSS, futures


def _done(plan: Plan, images_MCSS: Tensor, futures: list[Future[None]]) -> tuple[Plan, Tensor]:
    for future in futures:
        future.result()
    return plan, images_MCSS
