"""Colour augmentation of a batch where its pixels are: torchvision's definitions, parameters per sample.

A sample's result is the same bits in any batch, at any batch size and with any number of threads: every operation is
elementwise with one correctly rounded result, and the mean that contrast needs is an exact sum.

Shapes: B samples, C = 3 channels (red, green, blue), H x W pixels. Images are float32 in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading import color_batch, color_kernels
from dataloading.augment import AugmentConfig, ColorFactors


def augment_colors(
    crops_BCHW: Tensor, factors: ColorFactors, config: AugmentConfig, out: Tensor | None = None
) -> Tensor:
    """Return the crops after flip, jitter and grayscale (in the configured order), blur, solarise and normalise.

    crops_BCHW: float32 in [0, 1], contiguous; its memory is used up and returned. Or uint8, with out: float32 of the
    same shape and device, contiguous, which is returned. factors: of the same B.
    """
    assert len(factors) == len(crops_BCHW), f"{len(factors)} factors for {len(crops_BCHW)} crops"
    images_BCHW = _images(crops_BCHW, out)
    if images_BCHW.device.type == "cpu":
        color_kernels.augment_colors(images_BCHW.numpy(), factors, config, _bytes(crops_BCHW))
        return images_BCHW
    if images_BCHW is not crops_BCHW:
        images_BCHW.copy_(crops_BCHW).div_(255.0)
    color_batch.augment_colors(images_BCHW, factors, config)
    return color_batch.normalize(images_BCHW, config.mean, config.std)


def normalize(
    crops_BCHW: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out: Tensor | None = None,
) -> Tensor:
    """Return the crops less the mean, divided by the standard deviation of each channel; arguments as above."""
    images_BCHW = _images(crops_BCHW, out)
    if images_BCHW.device.type == "cpu":
        color_kernels.normalize(images_BCHW.numpy(), mean, std, _bytes(crops_BCHW))
        return images_BCHW
    if images_BCHW is not crops_BCHW:
        images_BCHW.copy_(crops_BCHW).div_(255.0)
    return color_batch.normalize(images_BCHW, mean, std)


def _images(crops_BCHW: Tensor, out: Tensor | None) -> Tensor:
    images_BCHW = crops_BCHW if out is None else out
    assert images_BCHW.is_contiguous(), "images that are not contiguous"
    assert images_BCHW.dtype == torch.float32, f"images of {images_BCHW.dtype}"
    return images_BCHW


def _bytes(crops_BCHW: Tensor) -> NDArray[np.uint8] | None:
    return crops_BCHW.contiguous().numpy() if crops_BCHW.dtype == torch.uint8 else None
