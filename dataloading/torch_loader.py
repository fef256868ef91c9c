"""The reference: the same windows and colour factors, given to torchvision's own functions one image at a time.

Tests judge the fast paths by it; it also serves where neither DALI nor nvImageCodec is available.

Shapes: M windows, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dataloading.augment import AugmentConfig, ColorFactors, kernel_size
from dataloading.device_copies import host_memory, to_device
from dataloading.plan import Plan

_ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


class ReferenceMemoryCrops:
    """Crops of images that lie in memory, by torchvision in float."""

    def __init__(self, pixels_NHWC: NDArray[np.uint8], size: int, device: torch.device) -> None:
        self._pixels_NHWC, self._size, self._device = pixels_NHWC, size, device

    def crops(self, plans: Iterator[Plan]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield each plan with its crops, float32 in [0, 1], (M, C, S, S)."""
        for plan in plans:
            shape = torch.Size((plan.num_windows, 3, self._size, self._size))
            crops_MCSS = host_memory(shape, torch.float32, self._device)
            windows = zip(plan.sources_M, plan.anchors_M2.tolist(), plan.sizes_M2.tolist(), strict=True)
            for m, (row, (top, left), (height, width)) in enumerate(windows):
                pixels = torch.from_numpy(self._pixels_NHWC[row].copy()).permute(2, 0, 1).to(torch.float32).div_(255.0)
                crops_MCSS[m] = tv.resized_crop(
                    pixels, top, left, height, width, [self._size, self._size], antialias=True
                )
            yield plan, to_device(crops_MCSS, self._device)

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
