"""Colour augmentation of a whole batch in torch operations, for GPUs.

A sample's result is the same bits in any batch, at any batch size and with any number of threads: every operation is
elementwise with one correctly rounded result (so it does not matter which elements a kernel vectorises or fuses), and
the mean that contrast needs is an exact sum. Only samples that need an operation are touched.

Shapes: B samples, C = 3 channels (red, green, blue), H x W pixels. Images are float32 in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.augment import BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, AugmentConfig, ColorFactors, blur_taps
from dataloading.device_copies import to_device

_NO_OPERATION = 4


def augment_colors(images_BCHW: Tensor, factors: ColorFactors, config: AugmentConfig) -> None:
    """Flip, jitter and grayscale (in the configured order), blur and solarise, in place.

    images_BCHW: in [0, 1], contiguous. factors: of the same B.
    """
    _change(images_BCHW, factors.flip_B, lambda images, _: images.flip(-1))
    for name in config.order:
        if name == "grayscale":
            _change(images_BCHW, factors.grayscale_B, lambda images, _: _gray(images)[:, None].expand_as(images))
        else:
            _jitter(images_BCHW, factors, config)
    _change(images_BCHW, factors.sigma_B > 0, lambda images, chosen: _blur(images, factors.sigma_B[chosen]))
    _change(images_BCHW, factors.solarize_B, lambda images, _: torch.where(images >= 0.5, 1.0 - images, images))


def normalize(images_BCHW: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel, in place."""
    for channel in range(3):
        images_BCHW[:, channel].sub_(mean[channel]).div_(std[channel])
    return images_BCHW


def _change(images_BCHW: Tensor, chosen_B: NDArray[np.bool_], operation) -> None:
    """Replace the chosen images by `operation(images, their numbers)`."""
    chosen = np.flatnonzero(chosen_B)
    if len(chosen):
        places = _to(chosen, images_BCHW)
        images_BCHW.index_copy_(0, places, operation(images_BCHW.index_select(0, places), chosen))


def _jitter(images_BCHW: Tensor, factors: ColorFactors, config: AugmentConfig) -> None:
    """Apply the four jitter operations in each sample's own order, in place.

    In each of the four slots the samples are sorted by their operation, so that each operation works on a slice.
    """
    enabled = np.array([*(strength > 0.0 for strength in config.jitter), False])
    operations_B4 = np.where(factors.jitter_B[:, None], factors.order_B4, _NO_OPERATION)
    operations_B4 = np.where(enabled[operations_B4], operations_B4, _NO_OPERATION)
    images, places = images_BCHW, np.arange(len(images_BCHW))
    for slot in range(4):
        arrangement = np.argsort(operations_B4[places, slot], kind="stable")
        if (arrangement[1:] < arrangement[:-1]).any():
            images, places = images.index_select(0, _to(arrangement, images)), places[arrangement]
        ends = np.searchsorted(operations_B4[places, slot], np.arange(_NO_OPERATION), side="right")
        for operation, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < end:
                factors_b = factors.factors_B4[places[start:end], operation]
                _OPERATIONS[operation](images[start:end], factors_b)
    if images is not images_BCHW:
        images_BCHW.index_copy_(0, _to(places, images), images)


def _brightness(images_BCHW: Tensor, factors_B: NDArray[np.float32]) -> None:
    images_BCHW.mul_(_per_sample(factors_B, images_BCHW)).clamp_(0.0, 1.0)


def _contrast(images_BCHW: Tensor, factors_B: NDArray[np.float32]) -> None:
    factors = _per_sample(factors_B, images_BCHW)
    # Adding 1 rounds gray to multiples of 2^-23; a float64 adds up to 2^29 of those exactly, in whatever order.
    sums = _gray(images_BCHW).add_(1.0).flatten(1).sum(dim=1, dtype=torch.float64)
    means = (sums / images_BCHW[0, 0].numel() - 1.0).to(torch.float32).view(-1, 1, 1, 1)
    images_BCHW.mul_(factors).add_(means * (1.0 - factors)).clamp_(0.0, 1.0)


def _saturation(images_BCHW: Tensor, factors_B: NDArray[np.float32]) -> None:
    factors = _per_sample(factors_B, images_BCHW)
    gray = _gray(images_BCHW).mul_(1.0 - factors[:, 0])
    images_BCHW.mul_(factors).add_(gray[:, None]).clamp_(0.0, 1.0)


def _hue(images_BCHW: Tensor, turns_B: NDArray[np.float32]) -> None:
    """Turn the hue (of HSV) by a share of the circle.

    Written without selections, which are slow on a CPU. With chroma = max - min and hue in sixths of a circle in
    [-3, 3], red at 0: |hue| = 1.5 - (2 (red - min) / chroma - 1) (1.5 - |green - blue| / chroma), and its sign is that
    of green - blue. A channel with its hue at s is min + chroma * clamp(2 - distance(hue, s), 0, 1).
    """
    red, green, blue = images_BCHW.unbind(1)
    largest = torch.maximum(red, green)
    largest = torch.maximum(largest, blue, out=largest)
    smallest = torch.minimum(red, green)
    smallest = torch.minimum(smallest, blue, out=smallest)
    chroma = largest.sub_(smallest)
    divisor = chroma.clamp(min=1e-20)
    opponent = torch.sub(green, blue).div_(divisor)
    hue = torch.sub(red, smallest).div_(divisor).mul_(2.0).sub_(1.0)
    work = torch.abs(opponent, out=divisor).neg_().add_(1.5)
    hue.mul_(work).neg_().add_(1.5).copysign_(opponent)
    base = smallest.sub_(chroma)
    for channel, center in enumerate((0.0, 2.0, 4.0)):
        # Taken into [-3, 3], the shift leaves hue + shift in [-6, 6], where 3 - distance is ||hue + shift| - 3|.
        shifts_B = (6.0 * turns_B.astype(np.float64) - center + 3.0) % 6.0 - 3.0
        torch.add(hue, _per_sample(shifts_B, images_BCHW)[:, 0], out=work)
        work.abs_().sub_(3.0).abs_().clamp_(1.0, 2.0).mul_(chroma).add_(base)
        torch.clamp(work, 0.0, 1.0, out=images_BCHW[:, channel])


_OPERATIONS = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}


def _blur(images_BCHW: Tensor, sigma_B: NDArray[np.float32]) -> Tensor:
    """Blur each image with a Gaussian of its own; borders are reflected. Taps are paired and added one by one."""
    weights_BT = blur_taps(sigma_B, images_BCHW.shape[-1])
    radius = weights_BT.shape[1] - 1
    taps = [_per_sample(weights_BT[:, tap], images_BCHW) for tap in range(radius + 1)]
    for dim, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        length = images_BCHW.shape[dim]
        padded = torch.nn.functional.pad(images_BCHW, padding, mode="reflect")
        images_BCHW = images_BCHW * taps[0]
        for tap in range(1, radius + 1):
            pair = padded.narrow(dim, radius - tap, length) + padded.narrow(dim, radius + tap, length)
            images_BCHW.add_(pair.mul_(taps[tap]))
    return images_BCHW


def _gray(images_BCHW: Tensor) -> Tensor:
    """Return the luma (B, H, W)."""
    red, green, blue = images_BCHW.unbind(1)
    # Not add(alpha=...): whether that is fused into one rounding depends on the kernel.
    gray, product = red * GRAY[0], green * GRAY[1]
    return gray.add_(product).add_(torch.mul(blue, GRAY[2], out=product))


def _per_sample(values_B: NDArray[np.floating], like: Tensor) -> Tensor:
    values = torch.from_numpy(np.ascontiguousarray(values_B, dtype=np.float32))
    return to_device(values, like.device).view(-1, 1, 1, 1)


def _to(numbers: NDArray[np.int64], like: Tensor) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)), like.device)
