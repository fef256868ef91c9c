"""Decode, crop and resize in NVIDIA DALI, on the CPU or on a GPU.

DALI gets encoded bytes and windows and returns 8-bit crops; it draws no random numbers, so its results depend on
nothing but its inputs. Batches are fed and scheduled one by one: there is no Python source that DALI would call ahead
of time, whose exceptions would stick, and whose process start method would matter.

Shapes: M windows, S side of a crop, C = 3 channels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from dataloading.encoded import DecodeFailed


class DaliDecoder:
    """A DALI pipeline that lives as long as the run: DALI keeps memory of every pipeline that was ever built."""

    def __init__(self, *, size: int, max_windows: int, device: torch.device, num_threads: int) -> None:
        self._pipeline = _pipeline(size, max_windows, device, num_threads)

    def submit(
        self, encoded: list[NDArray[np.uint8]], anchors_M2: NDArray[np.int64], sizes_M2: NDArray[np.int64]
    ) -> None:
        """Start a batch; DALI copies the inputs and works in its own threads."""
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("anchors", anchors_M2.astype(np.int32))
        self._pipeline.feed_input("sizes", sizes_M2.astype(np.int32))
        self._pipeline.schedule_run()

    def collect(self) -> Tensor:
        """Return the oldest batch not yet collected, uint8 (M, C, S, S), on the device.

        Raises DecodeFailed if one of its images could not be decoded; the batches behind it are not affected.
        """
        try:
            (crops,) = self._pipeline.outputs()
        except RuntimeError as error:
            # DALI gives up the whole batch and names no sample reliably; the pipeline goes on (its message says not).
            raise DecodeFailed(str(error)) from error
        return torch.from_dlpack(crops.as_tensor()).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Give the pipeline's threads and memory back."""
        del self._pipeline


def _pipeline(size: int, max_windows: int, device: torch.device, num_threads: int) -> Pipeline:
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
        if device_id is None:
            windows = fn.decoders.image_slice(encoded, **window, **decode)
        else:
            # Region decoding on the GPU fails on some of nvImageCodec 0.9 (nvImageCodec#55). The hardware decoder's
            # pixels differ from the software's, and who decodes an image would depend on its batch.
            images = fn.decoders.image(encoded, device="mixed", hw_decoder_load=0.0, **decode)
            windows = fn.slice(images, **window)
        crops = fn.resize(windows, size=[size, size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(crops)
    pipeline.build()
    return pipeline
