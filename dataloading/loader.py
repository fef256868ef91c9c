"""Batches for training and evaluation: this rank's part of every global step, on the device.

Four image paths stand behind one contract: small images that lie in memory are cropped in torch on the device
(`memory`), encoded images go through DALI (`dali`, for GPUs) or nvImageCodec, the decoders inside DALI (`nvimgcodec`,
for CPUs), and torchvision is the slow reference for all (`torch`).

Shapes: B samples of this rank, V views, C = 3 channels, S side of a view, G global batch, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, repeat
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from dataloading.augment import AugmentConfig
from dataloading.choices import BACKENDS
from dataloading.crop import MemoryCrops
from dataloading.damaged import BadRow, DamagedRows
from dataloading.downloads import ShardDownloads
from dataloading.encoded import Decoder, EncodedCrops
from dataloading.finish import Augmented, Finisher, Normalized, Reference
from dataloading.image_decoder import ImageDecoder
from dataloading.order import OrderConfig, StepRows, make_order
from dataloading.plan import EvalPlanner, Plan, Planner, TrainPlanner
from dataloading.shard_reader import RemoteShards, ShardReader

if TYPE_CHECKING:
    from dataloading.index import Dataset


_READ_TOGETHER, _REMOTE_READERS = 16, 32
_NVIDIA = ("dali", "nvimgcodec")


@dataclass(frozen=True)
class Batch:
    """Images with the dataset rows that they are."""

    images_BCHW: Tensor
    """float32, normalised, on the device; (V, B, C, S, S) if there are several views (`images_VBCHW`)."""
    indices_B: Tensor
    """Dataset row numbers, int64, on the CPU."""
    valid_B: Tensor
    """bool, on the CPU. False: the image is damaged and shows another; no loss, no write to the bank."""

    @property
    def images_VBCHW(self) -> Tensor:
        """The images with a dimension for views, also if there is only one."""
        return self.images_BCHW if self.images_BCHW.dim() == 5 else self.images_BCHW[None]


class Crops(Protocol):
    """A way from plans to pixels. Plans are taken ahead of the crops that are yielded."""

    def crops(self, plans: Iterator[Plan]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield for each plan the plan as carried out (rows that failed replaced) and its crops, (M, C, S, S).

        Crops are float32 in [0, 1] or uint8.
        """
        ...

    def close(self) -> None:
        """End threads and free memory."""
        ...


class Loader:
    """An endless source of one rank's batches; made once per run by `make_loader`."""

    def __init__(
        self,
        crops: Crops | None,
        empty: Batch,
        finisher: Finisher,
        planner: Planner,
        damaged: DamagedRows,
        *,
        step_rows: StepRows,
        num_views: int,
        downloads: ShardDownloads | None = None,
    ) -> None:
        self._crops, self._empty, self._finisher = crops, empty, finisher
        self._planner, self._damaged = planner, damaged
        self._step_rows, self._num_views, self._downloads = step_rows, num_views, downloads

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this rank's batch of step start_step, start_step + 1, and so on without end.

        A new call starts anew at its step and ends iterators of earlier calls. Raises ValueError if no image of the
        dataset can be decoded, OSError if the storage fails.
        """
        if self._crops is None:
            yield from repeat(self._empty)
            return
        if self._downloads is not None:
            self._downloads.start(start_step)
        finished = self._finisher.images(self._crops.crops(self._plans(start_step)))
        for step, (plan, images) in enumerate(finished, start_step):
            if self._downloads is not None:
                self._downloads.advance(step)
            if self._num_views > 1:
                images = images.view(self._num_views, len(plan.rows_B), *images.shape[1:])
            yield _batch(plan, images)

    def close(self) -> None:
        """End the threads of the loader. It yields nothing afterwards."""
        if self._downloads is not None:
            self._downloads.close()
        if self._crops is not None:
            self._crops.close()
        self._finisher.close()

    def failed_rows(self, start: int = 0) -> list[BadRow]:
        """Return the rows whose images failed so far, in the order in which they did, without the first `start`.

        Those that the index lists as bad are never tried and not among them.
        """
        return self._damaged.found(start)

    def _plans(self, start_step: int) -> Iterator[Plan]:
        for step in count(start_step):
            if self._downloads is not None:
                self._downloads.read_ahead(step)
            yield self._planner.plan(self._step_rows.rows(step), self._step_rows.visits(step))


def make_loader(
    dataset: Dataset,
    augment: AugmentConfig,
    *,
    seed: int,
    global_batch: int,
    offsets: tuple[int, int],
    device: torch.device | str,
    num_threads: int,
    backend: str = "auto",
    order: OrderConfig | None = None,
) -> Loader:
    """Return the loader of one rank.

    seed: of the stream and of the augmentation. global_batch: G. offsets: this rank's contiguous part [start, stop) of
    the G positions of a step; may be empty. num_threads: threads that decode, and as many that finish images on a CPU;
    readers, which mostly wait, come on top. backend: one of `BACKENDS`; `auto` takes memory where the pixels are there,
    else DALI on a GPU and nvImageCodec on a CPU, else torch. order: None is the full permutation.
    """
    start, stop = offsets
    if not 0 <= start <= stop <= global_batch:
        raise ValueError(f"offsets: found {offsets}, expected 0 <= start <= stop <= global batch {global_batch}")
    device = torch.device(device)
    views = (augment.num_views,) if augment.num_views > 1 else ()
    no_images = torch.empty((*views, 0, 3, augment.size, augment.size), device=device)
    empty = Batch(no_images, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool))
    damaged = DamagedRows(dataset.index)
    planner = TrainPlanner(dataset.index, damaged, augment, seed)
    crops, is_reference = None, False
    if num_windows := (stop - start) * augment.num_views:
        crops, is_reference = _open_crops(
            dataset, planner, damaged, augment.size, num_windows, device, num_threads, backend
        )

    chosen = make_order(dataset, order or OrderConfig(), seed=seed, global_batch=global_batch)
    return Loader(
        crops,
        empty,
        Finisher(Reference(augment) if is_reference else Augmented(augment), num_threads),
        planner,
        damaged,
        step_rows=StepRows(chosen, global_batch, offsets),
        num_views=augment.num_views,
        downloads=_downloads(dataset, order, seed, global_batch, offsets) if crops is not None else None,
    )


def _downloads(
    dataset: Dataset, order: OrderConfig | None, seed: int, global_batch: int, offsets: tuple[int, int]
) -> ShardDownloads | None:
    """Return what fetches the shards that this rank reads, None for images that are here or are not packed."""
    read = dataset.read
    if dataset.shards is None or not isinstance(read, ShardReader) or not isinstance(read.source, RemoteShards):
        return None
    if read.source.cache is None:
        return None
    # An order of its own: the thread works beside the planner.
    own = make_order(dataset, order or OrderConfig(), seed=seed, global_batch=global_batch)
    return ShardDownloads(read.source, dataset.shards, own, global_batch, offsets)


def eval_batches(
    dataset: Dataset,
    rows: Sequence[int],
    *,
    resize: int,
    crop: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    device: torch.device | str,
    num_threads: int,
    backend: str = "auto",
) -> Iterator[Batch]:
    """Yield the given rows in order, batch_size at a time (the last may be smaller), without augmentation.

    The central crop x crop pixels of the image whose shorter side is resized to `resize`, normalised. Damaged images
    are replaced and marked as in training.
    """
    rows_R = np.asarray(rows, dtype=np.int64)
    damaged = DamagedRows(dataset.index)
    planner = EvalPlanner(dataset.index, damaged, resize, crop)
    finisher = Finisher(Normalized(mean, std), num_threads)
    crops, _ = _open_crops(dataset, planner, damaged, crop, batch_size, torch.device(device), num_threads, backend)
    parts = (rows_R[start : start + batch_size] for start in range(0, len(rows_R), batch_size))
    try:
        planned = (planner.plan(part, np.zeros_like(part)) for part in parts)
        for plan, images_BCHW in finisher.images(crops.crops(planned)):
            yield _batch(plan, images_BCHW)
    finally:
        crops.close()
        finisher.close()


def _open_crops(
    dataset: Dataset,
    planner: Planner,
    damaged: DamagedRows,
    size: int,
    num_windows: int,
    device: torch.device,
    num_threads: int,
    backend: str,
) -> tuple[Crops, bool]:
    """Return the image path, and whether it is the torchvision reference."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    if num_threads < 1:
        raise ValueError(f"num_threads: found {num_threads}, expected at least 1")
    if backend == "auto":
        backend = "memory" if dataset.pixels_NHWC is not None else _best_decoder(device)
    if backend == "memory":
        if dataset.pixels_NHWC is None:
            raise ValueError(f"backend 'memory': {dataset.index.source} has no pixels in memory; use 'auto'")
        return MemoryCrops(dataset.pixels_NHWC, size, device), False
    if dataset.pixels_NHWC is not None and backend == "torch":
        from dataloading.torch_loader import ReferenceMemoryCrops

        return ReferenceMemoryCrops(dataset.pixels_NHWC, size, device), True
    if dataset.read is None:
        raise ValueError(f"backend {backend!r}: {dataset.index.source} has no encoded images; use 'auto'")
    # Readers need a core now and then (0.1 ms an image), or only wait for a far place: the decoder has the cores.
    is_remote = getattr(dataset.read, "is_remote", False)
    num_readers = _REMOTE_READERS if is_remote else max(1, num_threads // 4)
    decoder = _open_decoder(backend, size, num_windows, device, num_threads)
    together = 1 if is_remote else _READ_TOGETHER
    crops = EncodedCrops(
        dataset.read, dataset.index, planner, damaged, decoder, num_readers=num_readers, read_together=together
    )
    return crops, backend == "torch"


def _best_decoder(device: torch.device) -> str:
    """Return the fastest backend for encoded images that is installed."""
    has = {name: find_spec("nvidia") is not None and find_spec(f"nvidia.{name}") is not None for name in _NVIDIA}
    wanted = "nvimgcodec" if device.type == "cpu" else "dali"
    return wanted if has[wanted] else "torch"


def _open_decoder(backend: str, size: int, num_windows: int, device: torch.device, num_threads: int) -> Decoder:
    if backend == "dali":
        from dataloading.dali_pipeline import DaliDecoder

        return DaliDecoder(size=size, max_windows=num_windows, device=device, num_threads=num_threads)
    fast = None
    if backend == "nvimgcodec":
        from dataloading.nvimgcodec_decoder import decode_part as fast
    return ImageDecoder(fast, size=size, device=device, num_threads=num_threads)


def _batch(plan: Plan, images: Tensor) -> Batch:
    return Batch(images, torch.from_numpy(plan.rows_B), torch.from_numpy(plan.valid_B))
