"""Decode, crop and resize in NVIDIA DALI, on the CPU or on a GPU.

DALI gets encoded bytes and windows and returns 8-bit crops; it draws no random numbers, so its results depend on
nothing but its inputs. Batches are fed and scheduled one by one: there is no Python source that DALI would call ahead
of time, whose exceptions would stick, and whose process start method would matter.

Shapes: M windows, S side of a crop, C = 3 channels.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import NamedTuple, cast

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from PIL import Image
from torch import Tensor

from dataloading import pillow
from dataloading.dali_self_test import may_decode_regions
from dataloading.device_copies import to_device
from dataloading.encoded import Decoded, Window
from dataloading.orientation import TURNS
from dataloading.read_errors import raise_if_of_memory
from dataloading.resize import resize_into

_DEVICE_ERROR = re.compile(
    # Whole phrases: messages hold paths of installed files.
    r"CUDA (?:driver |runtime )?(?:API )?(?:error|failure)|CUDA allocation failed|CUDA_ERROR_[A-Z]|cudaError[A-Z]"
    r"|out of memory|bad_alloc|NVML error"
)


@dataclass
class _Batch:
    """A batch on its way through the pipeline."""

    windows: Sequence[Window]
    is_done: bool = False
    crops: Tensor | None = None
    """None where it failed."""


class DaliDecoder:
    """A `Decoder` around one pipeline for the whole run: DALI keeps memory of every pipeline that was ever built.

    DALI fails as a whole batch. Then the batch is halved until the damaged images are known; those go to Pillow, and
    an image that failed before is decoded by itself. Now and then DALI's threads still work on a failed batch when its
    memory is gone, and the process ends with a segmentation fault (2.4, on CPUs; seen with 5 of 698 hostile files).
    """

    def __init__(self, *, size: int, max_windows: int, device: torch.device, num_threads: int) -> None:
        self._size, self._device = size, device
        regions = device.type == "cpu" or may_decode_regions(device.index or 0)
        self._settings = _Settings(size, max_windows, device, num_threads, regions)
        self._pipeline = _IDLE.take(self._settings)
        self._batches: deque[_Batch] = deque()

    def submit(self, windows: Sequence[Window]) -> None:
        """Start a batch; DALI copies the inputs and works in its own threads."""
        self._run(windows)
        self._batches.append(_Batch(windows))

    def collect(self) -> Decoded:
        """Wait for the oldest batch that was not collected yet."""
        batch = self._batches.popleft()
        self._finish(batch)
        crops, missing = batch.crops, list(range(len(batch.windows)))
        if crops is not None:
            missing = [m for m in missing if not _in_batch(batch.windows[m])]
        if not missing:
            return Decoded(cast(Tensor, crops), {})
        # The pipeline answers in order, so what it was given before comes first.
        for waiting in self._batches:
            self._finish(waiting)
        if crops is None:
            shape = (len(batch.windows), 3, self._size, self._size)
            crops = torch.empty(shape, dtype=torch.uint8, device=self._device)
        else:
            crops = crops.clone()  # DALI's memory is not ours to write to
        reasons = {}
        for m in self._retry(batch.windows, missing, crops):
            if reason := batch.windows[m].reason or self._decode_by_pillow(batch.windows[m], crops[m]):
                reasons[m] = reason
        return Decoded(crops, reasons)

    def close(self) -> None:
        """Leave the pipeline to the next decoder with the same settings."""
        # What the pipeline was given is taken from it, but nothing that failed is tried again: nobody wants it now.
        with contextlib.suppress(RuntimeError):
            for batch in self._batches:
                self._finish(batch)
        if all(batch.is_done and batch.crops is not None for batch in self._batches):
            _IDLE.give_back(self._settings, self._pipeline)
        del self._pipeline

    def _run(self, windows: Sequence[Window]) -> None:
        """Give windows to the pipeline; where it must not see an image it gets a placeholder of one pixel."""
        shown = [_in_batch(window) or len(windows) == 1 for window in windows]
        pairs = list(zip(windows, shown, strict=True))
        anchors = [window.anchor if is_shown else (0, 0) for window, is_shown in pairs]
        sizes = [window.size if is_shown else (1, 1) for window, is_shown in pairs]
        encoded = [np.frombuffer(window.encoded if is_shown else _one_pixel(), np.uint8) for window, is_shown in pairs]
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("anchors", np.array(anchors, dtype=np.int32))
        self._pipeline.feed_input("sizes", np.array(sizes, dtype=np.int32))
        self._pipeline.schedule_run()

    def _outputs(self, windows: Sequence[Window]) -> Tensor | None:
        """Return the pipeline's next batch, which are these windows, turned; None if it failed."""
        on_gpu = self._device.type == "cuda"
        # Bound to torch's stream, DALI uses their memory again only after what torch was given to do with it.
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        try:
            (crops,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            # DALI names no sample reliably, and says that the pipeline is done for, which it is not.
            if is_of_the_device(str(error)):
                raise
            return None
        return _turned(torch.from_dlpack(crops.as_tensor()).permute(0, 3, 1, 2), windows)

    def _finish(self, batch: _Batch) -> None:
        if not batch.is_done:
            batch.is_done, batch.crops = True, self._outputs(batch.windows)

    def _retry(self, windows: Sequence[Window], missing: Sequence[int], crops: Tensor) -> list[int]:
        """Decode the missing windows into crops, halving what fails; return those that DALI cannot do."""
        failed = [m for m in missing if not windows[m].is_plain]
        parts = [[m] for m in missing if windows[m].is_plain and windows[m].failed_before]
        parts.append([m for m in missing if _in_batch(windows[m])])
        while parts:
            part = parts.pop()
            if not part:
                continue
            shown = [windows[m] for m in part]
            self._run(shown)
            found = self._outputs(shown)
            if found is not None:
                crops.index_copy_(0, to_device(torch.tensor(part), crops.device), found)
            elif len(part) == 1:
                failed += part
            else:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
        return failed

    def _decode_by_pillow(self, window: Window, crop_CSS: Tensor) -> str:
        """Decode one window with Pillow; return the reason if that fails too, else an empty string."""
        try:
            pixels_HWC = pillow.decode_part(
                window.encoded, window.anchor, window.size, window.orientation, window.rules
            )
        except Exception as error:  # a decoder that meets a damaged file raises nearly anything
            raise_if_of_memory(error, f"a window of {window.size[1]} x {window.size[0]} pixels")
            return f"cannot be decoded: {type(error).__name__}: {error}"
        resized_CSS = torch.empty(crop_CSS.shape, dtype=torch.uint8)
        resize_into(pixels_HWC, resized_CSS)
        crop_CSS.copy_(resized_CSS)
        return ""


class _Settings(NamedTuple):
    """What a pipeline is built for."""

    size: int
    max_windows: int
    device: torch.device
    num_threads: int
    regions: bool


class _IdlePipelines:
    """Pipelines that nobody uses: every evaluation would otherwise build two, whose memory DALI keeps."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: deque[tuple[_Settings, Pipeline]] = deque()

    def take(self, settings: _Settings) -> Pipeline:
        """Return an idle pipeline, or a new one."""
        for place, (kept, pipeline) in enumerate(self._kept):
            if kept == settings:
                del self._kept[place]
                return pipeline
        size, max_windows, device, num_threads, regions = settings
        return build_pipeline(size, max_windows, device, num_threads, regions=regions)

    def give_back(self, settings: _Settings, pipeline: Pipeline) -> None:
        """Keep a pipeline from which everything was collected; the oldest goes where there are too many."""
        self._kept.append((settings, pipeline))
        if len(self._kept) > self._most:
            self._kept.popleft()


_IDLE = _IdlePipelines(most=2)


def is_of_the_device(message: str) -> bool:
    """Return whether an error that DALI reports is one of the GPU or of memory: no image is to blame for it."""
    return _DEVICE_ERROR.search(message) is not None


def _in_batch(window: Window) -> bool:
    """Return whether a window goes through DALI together with others."""
    return window.is_plain and not window.failed_before


def _turned(crops_BCSS: Tensor, windows: Sequence[Window]) -> Tensor:
    """Return the crops the right way up: themselves, or where any has to be turned a copy."""
    found = {window.orientation for window in windows} - {1}
    crops_BCSS = crops_BCSS.clone() if found else crops_BCSS
    for orientation in found:
        places = [m for m, window in enumerate(windows) if window.orientation == orientation]
        transposed, up_down, left_right = TURNS[orientation]
        part = crops_BCSS[places]
        part = part.transpose(2, 3) if transposed else part
        crops_BCSS[places] = part.flip([2] * up_down + [3] * left_right)
    return crops_BCSS


@cache
def _one_pixel() -> bytes:
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def build_pipeline(size: int, max_windows: int, device: torch.device, num_threads: int, *, regions: bool) -> Pipeline:
    """Return the pipeline with inputs "encoded", "anchors" and "sizes"; regions: decode windows, not whole images."""
    device_id = None if device.type == "cpu" else device.index or 0
    # Depth 1: the first schedule_run would otherwise ask for as many batches as the queue is deep. More than one batch
    # can be in flight all the same.
    pipeline = Pipeline(max_windows, num_threads, device_id, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        anchors = fn.external_source(name="anchors", dtype=DALIDataType.INT32, ndim=1)
        sizes = fn.external_source(name="sizes", dtype=DALIDataType.INT32, ndim=1)
        window = {"start": anchors, "shape": sizes, "axis_names": "HW"}
        decode = {"output_type": DALIImageType.RGB, "adjust_orientation": False}
        if device_id is not None:
            # The hardware decoder's pixels differ from the software's, and who decodes would depend on the batch.
            decode |= {"device": "mixed", "hw_decoder_load": 0.0}
        if regions:
            windows = fn.decoders.image_slice(encoded, **window, **decode)
        else:
            windows = fn.slice(fn.decoders.image(encoded, **decode), **window)
        crops = fn.resize(windows, size=[size, size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(crops)
    pipeline.build()
    return pipeline
