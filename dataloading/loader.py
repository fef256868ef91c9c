"""Batches for training and evaluation: this rank's part of every global step, on the device.

Four image paths stand behind one contract: small images that lie in memory are cropped in torch on the device
(`memory`), encoded images go through DALI (`dali`, for GPUs) or nvImageCodec, the decoders inside DALI (`nvimgcodec`,
for CPUs), and torchvision is the slow reference for all (`torch`).

Shapes: B samples of this rank, V views, L local views, C = 3 channels, S side of a view, s side of a local view,
G global batch, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count, repeat
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.augment import FIRST_LOCAL_VIEW, AugmentConfig
from dataloading.choices import BACKENDS
from dataloading.crop import MemoryCrops
from dataloading.damaged import BadRow, DamagedRows
from dataloading.downloads import EvaluationDownloads, ShardDownloads
from dataloading.encoded import Decoder, EncodedCrops
from dataloading.finish import Augmented, Finisher, Normalized, Reference
from dataloading.image_decoder import ImageDecoder
from dataloading.order import OrderConfig, StepRows, make_order
from dataloading.plan import EvalPlanner, Plan, Planner, TrainPlanner
from dataloading.shard_reader import RemoteShards, ShardReader
from dataloading.shared_reads import SharedReads

if TYPE_CHECKING:
    from dataloading.index import Dataset


_READ_TOGETHER, _REMOTE_READERS = 16, 32
_BATCHES_SHARED = 8
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
    local_images_LBCss: Tensor | None = None
    """As images_BCHW, (L, B, C, s, s): the smaller views of multi-crop, None where there are none."""

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


@dataclass(frozen=True)
class Views:
    """The views of one size: how they are planned, cropped and finished."""

    planner: Planner
    crops: Crops
    finisher: Finisher

    def images(self, steps: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield, for the rows and visits of each step, the plan as carried out and images, (V, B, C, S, S)."""
        plans = (self.planner.plan(rows_B, visits_B) for rows_B, visits_B in steps)
        for plan, images in self.finisher.images(self.crops.crops(plans)):
            yield plan, images.view(-1, len(plan.rows_B), *images.shape[1:])

    def close(self) -> None:
        """End threads and free memory."""
        self.crops.close()
        self.finisher.close()


class Loader:
    """An endless source of one rank's batches; made once per run by `make_loader`."""

    def __init__(
        self,
        views: Sequence[Views],
        empty: Batch,
        damaged: DamagedRows,
        *,
        step_rows: StepRows,
        downloads: ShardDownloads | None = None,
    ) -> None:
        """views: those of `images_BCHW` and, if there are any, the local ones; nothing for a rank without samples."""
        self._views, self._empty, self._damaged = views, empty, damaged
        self._step_rows, self._downloads = step_rows, downloads

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this rank's batch of step start_step, start_step + 1, and so on without end.

        A new call starts anew at its step and ends iterators of earlier calls. Raises ValueError if no image of the
        dataset can be decoded, OSError if the storage fails.
        """
        if not self._views:
            yield from repeat(self._empty)
            return
        if self._downloads is not None:
            self._downloads.start(start_step)
        images = [views.images(self._steps(start_step)) for views in self._views]
        for step, ((plan, images_VBCSS), *local) in enumerate(zip(*images, strict=True), start_step):
            if self._downloads is not None:
                self._downloads.advance(step)
            yield Batch(
                images_VBCSS if len(images_VBCSS) > 1 else images_VBCSS[0],
                torch.from_numpy(plan.rows_B),
                # An image may decode in one window and not in another.
                torch.from_numpy(np.logical_and.reduce([plan.valid_B, *(plan.valid_B for plan, _ in local)])),
                local[0][1] if local else None,
            )

    def close(self) -> None:
        """End the threads of the loader. It yields nothing afterwards."""
        if self._downloads is not None:
            self._downloads.close()
        for views in self._views:
            views.close()

    def failed_rows(self, start: int = 0) -> list[BadRow]:
        """Return the rows whose images failed so far, in the order in which they did, without the first `start`.

        Those that the index lists as bad are never tried and not among them.
        """
        return self._damaged.found(start)

    def _steps(self, start_step: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for step in count(start_step):
            if self._downloads is not None:
                self._downloads.read_ahead(step)
            yield self._step_rows.rows(step), self._step_rows.visits(step)


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
    damaged = DamagedRows(dataset.index)
    sizes, shown = [(augment, 0)], dataset
    if augment.num_local_views:
        sizes.append((augment.local, FIRST_LOCAL_VIEW))
        if dataset.read is not None and getattr(dataset.read, "is_remote", False):
            shown = replace(dataset, read=SharedReads(dataset.read, _BATCHES_SHARED * (stop - start)))
    views = []
    for config, first_view in sizes if start < stop else ():
        planner = TrainPlanner(dataset.index, damaged, config, seed, first_view)
        num_windows = (stop - start) * config.num_views
        crops, is_reference = _open_crops(
            shown, planner, damaged, config.size, num_windows, device, num_threads, backend
        )
        finish = Reference(config) if is_reference else Augmented(config)
        views.append(Views(planner, crops, Finisher(finish, num_threads)))

    chosen = make_order(dataset, order or OrderConfig(), seed=seed, global_batch=global_batch)
    return Loader(
        views,
        _empty_batch(augment, device),
        damaged,
        step_rows=StepRows(chosen, global_batch, offsets),
        downloads=_downloads(dataset, order, seed, global_batch, offsets) if views else None,
    )


def _empty_batch(augment: AugmentConfig, device: torch.device) -> Batch:
    """Return the batch of a rank without samples."""
    views = (augment.num_views,) if augment.num_views > 1 else ()
    images = torch.empty((*views, 0, 3, augment.size, augment.size), device=device)
    local = None
    if augment.num_local_views:
        local = torch.empty((augment.num_local_views, 0, 3, augment.local_size, augment.local_size), device=device)
    return Batch(images, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), local)


def _downloads(
    dataset: Dataset, order: OrderConfig | None, seed: int, global_batch: int, offsets: tuple[int, int]
) -> ShardDownloads | None:
    """Return what fetches the shards that this rank reads, None for images that are here or are not packed."""
    source = _cached_source(dataset)
    if source is None or dataset.shards is None:
        return None
    # An order of its own: the thread works beside the planner.
    own = make_order(dataset, order or OrderConfig(), seed=seed, global_batch=global_batch)
    return ShardDownloads(source, dataset.shards, own, global_batch, offsets)


def _evaluation_downloads(dataset: Dataset, rows_R: NDArray[np.int64]) -> EvaluationDownloads | None:
    """Return what fetches the shards of some rows, in the order of the rows; None as for `_downloads`."""
    source, read = _cached_source(dataset), dataset.read
    if source is None or not isinstance(read, ShardReader):
        return None
    shards_S, firsts_S = np.unique(read.shard_N[rows_R], return_index=True)
    return EvaluationDownloads(source, shards_S[np.argsort(firsts_S)].tolist())


def _cached_source(dataset: Dataset) -> RemoteShards | None:
    """Return where packed images are downloaded from, None for images that are here, not packed, or never kept."""
    read = dataset.read
    if dataset.shards is None or not isinstance(read, ShardReader) or not isinstance(read.source, RemoteShards):
        return None
    return None if read.source.cache is None else read.source


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
    damaged: DamagedRows | None = None,
    is_asked_to_end: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """Yield the given rows in order, batch_size at a time (the last may be smaller), without augmentation.

    The central crop x crop pixels of the image whose shorter side is resized to `resize`, normalised. Damaged images
    are replaced and marked as in training; damaged takes down the reasons. Far shards of these rows are fetched into
    the cache where it has room that training does not need: a later evaluation finds them there. is_asked_to_end():
    whether the evaluation is about to be given up, so that their head start is.
    """
    rows_R = np.asarray(rows, dtype=np.int64)
    damaged = damaged or DamagedRows(dataset.index)
    planner = EvalPlanner(dataset.index, damaged, resize, crop)
    finisher = Finisher(Normalized(mean, std), num_threads)
    crops, _ = _open_crops(dataset, planner, damaged, crop, batch_size, torch.device(device), num_threads, backend)
    parts = (rows_R[start : start + batch_size] for start in range(0, len(rows_R), batch_size))
    downloads = _evaluation_downloads(dataset, rows_R)
    try:
        if downloads is not None:
            downloads.start(is_asked_to_end)
        planned = (planner.plan(part, np.zeros_like(part)) for part in parts)
        for plan, images_BCHW in finisher.images(crops.crops(planned)):
            yield Batch(images_BCHW, torch.from_numpy(plan.rows_B), torch.from_numpy(plan.valid_B))
    finally:
        if downloads is not None:
            downloads.close()
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
