"""The reference image path: Pillow and torchvision, one image at a time, under the same contract as the fast paths.

It takes the same windows and colour factors and gives them to torchvision's own functions. Tests judge the fast paths
by it; it also serves where DALI is not available.

Shapes: M windows, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dataloading import pillow
from dataloading.augment import AugmentConfig, ColorFactors
from dataloading.color import kernel_size
from dataloading.encoded import DecodeFailed
from dataloading.plan import Plan

_ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


class PillowDecoder:
    """Decodes with Pillow and resizes with torchvision, in threads."""

    def __init__(self, *, size: int, device: torch.device, num_threads: int) -> None:
        self._size, self._device = size, device
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode-images")
        self._batches: deque[list[Future[Tensor]]] = deque()

    def submit(
        self, encoded: list[NDArray[np.uint8]], anchors_M2: NDArray[np.int64], sizes_M2: NDArray[np.int64]
    ) -> None:
        """Start a batch."""
        windows = zip(encoded, anchors_M2, sizes_M2, strict=True)
        decode = pillow.decode_crop
        self._batches.append(
            [self._threads.submit(decode, e.tobytes(), anchor, size, self._size) for e, anchor, size in windows]
        )

    def collect(self) -> Tensor:
        """Return the oldest batch, uint8 (M, C, S, S). Raises DecodeFailed if an image is damaged."""
        batch = self._batches.popleft()
        errors = [error for future in batch if (error := future.exception())]
        if errors:
            raise DecodeFailed(str(errors[0])) from errors[0]
        return torch.stack([future.result() for future in batch]).to(self._device)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


class ReferenceMemoryCrops:
    """Crops of images that lie in memory, by torchvision in float."""

    def __init__(self, pixels_NHWC: NDArray[np.uint8], size: int, device: torch.device) -> None:
        self._pixels_NHWC, self._size, self._device = pixels_NHWC, size, device

    def crops(self, plans: Iterator[Plan]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield each plan with its crops, float32 in [0, 1], (M, C, S, S)."""
        for plan in plans:
            crops_MCSS = torch.empty((plan.num_windows, 3, self._size, self._size))
            windows = zip(plan.sources_M, plan.anchors_M2.tolist(), plan.sizes_M2.tolist(), strict=True)
            for m, (row, (top, left), (height, width)) in enumerate(windows):
                pixels = torch.from_numpy(self._pixels_NHWC[row].copy()).permute(2, 0, 1).to(torch.float32).div_(255.0)
                crops_MCSS[m] = tv.resized_crop(
                    pixels, top, left, height, width, [self._size, self._size], antialias=True
                )
            yield plan, crops_MCSS.to(self._device)

    def close(self) -> None:
        """Nothing to end."""


def reference_colors(crops_MCSS: Tensor, factors: ColorFactors, config: AugmentConfig) -> Tensor:
    """Return the crops after flip, jitter, grayscale, blur, solarise and normalise, each by torchvision's function.

    crops_MCSS: float32 in [0, 1]. Returns float32 (M, C, S, S) on the same device.
    """
    images_MCSS = torch.empty_like(crops_MCSS)
    for sample, crop_CSS in enumerate(crops_MCSS):
        images_MCSS[sample] = _reference_color(crop_CSS, factors, sample, config)
    return images_MCSS


def _reference_color(image_CSS: Tensor, factors: ColorFactors, sample: int, config: AugmentConfig) -> Tensor:
    if factors.flip_B[sample]:
        image_CSS = tv.horizontal_flip(image_CSS)
    for name in config.order:
        if name == "grayscale" and factors.grayscale_B[sample]:
            image_CSS = tv.rgb_to_grayscale(image_CSS, num_output_channels=3)
        if name == "jitter" and factors.jitter_B[sample]:
            for operation in factors.order_B4[sample].tolist():
                image_CSS = _ADJUST[operation](image_CSS, float(factors.factors_B4[sample, operation]))
    if factors.sigma_B[sample] > 0.0:
        width, sigma = kernel_size(image_CSS.shape[-1]), float(factors.sigma_B[sample])
        image_CSS = tv.gaussian_blur(image_CSS, [width, width], [sigma, sigma])
    if factors.solarize_B[sample]:
        image_CSS = tv.solarize(image_CSS, threshold=0.5)
    return tv.normalize(image_CSS, list(config.mean), list(config.std))
