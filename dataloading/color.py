"""Colour augmentation of a batch where its pixels are: torchvision's definitions, parameters per sample.

A sample's result is the same bits in any batch, at any batch size and with any number of threads: every operation is
elementwise with one correctly rounded result, and the mean that contrast needs is an exact sum.

Shapes: B samples, C = 3 channels (red, green, blue), H x W pixels. Images are float32 in [0, 1].
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dataloading import color_batch, color_kernels
from dataloading.augment import AugmentConfig, ColorFactors


def to_unit_range(bytes_BCHW: Tensor, images_BCHW: Tensor) -> None:
    """Write bytes / 255 into images, float32, contiguous, on the same device."""
    if images_BCHW.device.type == "cpu":
        color_kernels.to_unit_range(bytes_BCHW.contiguous().numpy(), images_BCHW.numpy())
    else:
        images_BCHW.copy_(bytes_BCHW).div_(255.0)


def augment_colors(crops_BCHW: Tensor, factors: ColorFactors, config: AugmentConfig) -> Tensor:
    """Return the crops after flip, jitter and grayscale (in the configured order), blur, solarise and normalise.

    crops_BCHW: float32 in [0, 1], contiguous; its memory is used up and returned. factors: of the same B.
    Returns float32 (B, C, H, W) on the same device.
    """
    assert len(factors) == len(crops_BCHW), f"{len(factors)} factors for {len(crops_BCHW)} crops"
    assert crops_BCHW.is_contiguous(), "crops that are not contiguous"
    if crops_BCHW.device.type == "cpu":
        color_kernels.augment_colors(crops_BCHW.numpy(), factors, config)
    else:
        color_batch.augment_colors(crops_BCHW, factors, config)
    return normalize(crops_BCHW, config.mean, config.std)


def normalize(images_BCHW: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel, in place. Contiguous."""
    assert images_BCHW.is_contiguous(), "images that are not contiguous"
    if images_BCHW.device.type == "cpu":
        color_kernels.normalize(images_BCHW.numpy(), np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32))
    else:
        for channel in range(3):
            images_BCHW[:, channel].sub_(mean[channel]).div_(std[channel])
    return images_BCHW
