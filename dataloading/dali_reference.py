"""Plain DALI pipelines that our image path is measured against: decoding alone, and DALI's own random crops.

Shapes: B images, S side of a crop, C = 3 channels.
"""

from __future__ import annotations

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from dataloading.augment import IMAGENET_MEAN, IMAGENET_STD
from dataloading.color import normalize

CROPS, DECODE_ONLY = "crops", "decode only"


class DaliReference:
    """A pipeline that is fed encoded images batch by batch, as `dataloading.dali_pipeline` is."""

    def __init__(
        self,
        what: str,
        *,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        max_batch: int,
        num_threads: int,
    ) -> None:
        """what: CROPS (a random window, resized) or DECODE_ONLY (the whole image, and nothing else)."""
        self._what = what
        pipeline = Pipeline(max_batch, num_threads, None, prefetch_queue_depth=1, seed=0)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
            decode = {"output_type": DALIImageType.RGB, "adjust_orientation": False}
            if what == DECODE_ONLY:
                images = fn.decoders.image(encoded, **decode)
            else:
                windows = fn.decoders.image_random_crop(
                    encoded, random_area=list(scale), random_aspect_ratio=list(ratio), num_attempts=10, **decode
                )
                images = fn.resize(windows, size=[size, size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(images)
        pipeline.build()
        self._pipeline = pipeline

    def submit(self, encoded: list[bytes]) -> None:
        """Start a batch."""
        self._pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in encoded])
        self._pipeline.schedule_run()

    def collect(self) -> Tensor | None:
        """Return the oldest batch, normalised float32 (B, C, S, S); None where images are only decoded."""
        (images,) = self._pipeline.outputs()
        if self._what == DECODE_ONLY:
            return None
        crops_BSSC = torch.from_dlpack(images.as_tensor())
        images_BCSS = crops_BSSC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return normalize(images_BCSS.div_(255.0), IMAGENET_MEAN, IMAGENET_STD)
