"""Augmentation parameters: which window of an image, which colours; numbers only, no pixels.

Every parameter is a pure function of (seed, visit, row, view, purpose), so it depends neither on the batch nor on
workers, threads or restarts. What the parameters mean follows torchvision (`RandomResizedCrop`, `ColorJitter`,
`RandomGrayscale`, `GaussianBlur`, `RandomSolarize`); only the source of randomness differs.

Shapes: B samples, 2 (vertical, horizontal), 4 (brightness, contrast, saturation, hue).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import permutations
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.philox import Purpose, uniforms

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GRAY = (0.2989, 0.587, 0.114)
"""Luma of red, green and blue: ITU-R 601 as torchvision rounds it."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FIRST_LOCAL_VIEW = 128
"""Local views are numbered from here, so that their numbers do not depend on how many other views there are."""
_ATTEMPTS = 10
_ORDERS_24_4 = np.array(list(permutations(range(4))), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training image becomes a view. Raises ValueError at construction if a field is out of range."""

    size: int = 224
    """Side of the square view in pixels. 224: He et al. 2016, and NPID on ImageNet; 32 for CIFAR."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area. NPID's released code (lemniscate, main.py and cifar.py)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, log-uniform. torchvision's default, Szegedy et al. 2015."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    """Strength of brightness, contrast, saturation (factor in [max(0, 1 - x), 1 + x]) and hue (turns in [-x, x],
    at most 0.5). NPID's released code."""
    jitter_probability: float = 1.0
    """Share of the views that are jittered. NPID: always; SimCLR and MoCo v2: 0.8."""
    grayscale_probability: float = 0.2
    """Share of the views that lose their colour. NPID's released code."""
    flip_probability: float = 0.5
    """Share of the views that are mirrored. NPID on ImageNet: 0.5; its CIFAR code does not mirror: 0."""
    order: tuple[str, str] = ("grayscale", "jitter")
    """Which comes first. NPID: grayscale on ImageNet, jitter on CIFAR; they differ, since jitter colours no gray."""
    blur_probability: float = 0.0
    """Share of the views that are blurred. NPID: none; MoCo v2: 0.5."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation in pixels. SimCLR, MoCo v2."""
    solarize_probability: float = 0.0
    """Share of the views whose bright pixels (>= 0.5) are inverted. BYOL: 0.2 on one view."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green and blue in [0, 1], subtracted at the end."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of red, green and blue, by which the result is divided."""
    num_views: int = 1
    """Independent views per image. NPID, PIC and IDFD: 1."""
    num_local_views: int = 0
    """Further views per image, smaller ones of smaller parts (multi-crop). NPID: none; SwAV: 6."""
    local_size: int = 96
    """Side of the local views in pixels. SwAV."""
    local_scale: tuple[float, float] = (0.05, 0.14)
    """Range of a local view's share of the image area. SwAV."""

    def __post_init__(self) -> None:
        probabilities = [f.name for f in fields(self) if f.name.endswith("_probability")]
        for name in probabilities:
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "a number from 0 to 1")
        _check("size", self.size, self.size >= 1, "at least 1 pixel")
        _check("local_size", self.local_size, self.local_size >= 1, "at least 1 pixel")
        for name in ("scale", "local_scale"):
            low, high = getattr(self, name)
            _check(name, getattr(self, name), 0.0 < low <= high <= 1.0, "0 < low <= high <= 1")
        low, high = self.ratio
        _check("ratio", self.ratio, 0.0 < low <= high, "0 < low <= high")
        jitter_is_valid = len(self.jitter) == 4 and min(self.jitter) >= 0.0 and self.jitter[HUE] <= 0.5
        _check("jitter", self.jitter, jitter_is_valid, "four numbers at least 0, the last (hue) at most 0.5")
        order_is_valid = sorted(self.order) == ["grayscale", "jitter"]
        _check("order", self.order, order_is_valid, "('grayscale', 'jitter') or ('jitter', 'grayscale')")
        low, high = self.blur_sigma
        _check("blur_sigma", self.blur_sigma, 0.0 < low <= high, "0 < low <= high")
        _check("mean", self.mean, len(self.mean) == 3, "three numbers")
        _check("std", self.std, len(self.std) == 3 and min(self.std) > 0.0, "three numbers above 0")
        _check("num_views", self.num_views, 1 <= self.num_views <= 128, "1 to 128")
        _check("num_local_views", self.num_local_views, 0 <= self.num_local_views <= 128, "0 to 128")

    @property
    def local(self) -> AugmentConfig:
        """How the local views are made, where there are any: as the others but for number, size and scale."""
        return replace(
            self, size=self.local_size, scale=self.local_scale, num_views=self.num_local_views, num_local_views=0
        )


@dataclass(frozen=True)
class ColorFactors:
    """The colour parameters of B samples. All arrays have B as their first dimension."""

    jitter_B: NDArray[np.bool_]
    """Whether the sample is jittered."""
    order_B4: NDArray[np.int64]
    """The order of the four jitter operations: BRIGHTNESS, CONTRAST, SATURATION, HUE permuted."""
    factors_B4: NDArray[np.float32]
    """Brightness, contrast, saturation factor; hue in turns."""
    grayscale_B: NDArray[np.bool_]
    flip_B: NDArray[np.bool_]
    sigma_B: NDArray[np.float32]
    """Standard deviation of the blur in pixels; 0 where the sample is not blurred."""
    solarize_B: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.flip_B)

    def __getitem__(self, samples: slice | NDArray[np.int64]) -> ColorFactors:
        return ColorFactors(*(getattr(self, f.name)[samples] for f in fields(self)))

    @staticmethod
    def concatenate(parts: list[ColorFactors]) -> ColorFactors:
        """Return the samples of all parts, in order."""
        return ColorFactors(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(ColorFactors)))


def crop_windows(
    seed: int,
    visits_B: ArrayLike,
    rows_B: ArrayLike,
    heights_B: ArrayLike,
    widths_B: ArrayLike,
    *,
    view: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the windows of a random resized crop: anchors_B2 (top, left) and sizes_B2 (height, width), int64 pixels.

    As torchvision's `RandomResizedCrop.get_params`: ten attempts at an area uniform in `scale` and a log-uniform
    aspect ratio, the first that fits wins; else the largest central window within `ratio`. heights_B and widths_B
    are the image sizes in pixels, at least 1. Pure in (seed, visit, row, view) and the image's size.
    """
    heights_B1, widths_B1 = (np.asarray(a, dtype=np.int64)[:, None] for a in (heights_B, widths_B))
    draws = uniforms(seed, visits_B, rows_B, view=view, purpose=Purpose.CROP, num_draws=2 * _ATTEMPTS + 2)
    areas_BA = heights_B1 * widths_B1 * (scale[0] + draws[:, :_ATTEMPTS] * (scale[1] - scale[0]))
    log_low, log_high = log(ratio[0]), log(ratio[1])
    ratios_BA = np.exp(log_low + draws[:, _ATTEMPTS : 2 * _ATTEMPTS] * (log_high - log_low))
    tall_BA = np.rint(np.sqrt(areas_BA / ratios_BA)).astype(np.int64)
    wide_BA = np.rint(np.sqrt(areas_BA * ratios_BA)).astype(np.int64)
    fits_BA = (tall_BA > 0) & (tall_BA <= heights_B1) & (wide_BA > 0) & (wide_BA <= widths_B1)
    first_B1 = fits_BA.argmax(axis=1, keepdims=True)
    image_B2 = np.concatenate([heights_B1, widths_B1], axis=1)
    sizes_B2 = np.concatenate([np.take_along_axis(a, first_B1, axis=1) for a in (tall_BA, wide_BA)], axis=1)
    anchors_B2 = np.floor(draws[:, 2 * _ATTEMPTS :] * (image_B2 - sizes_B2 + 1)).astype(np.int64)
    fits_B1 = fits_BA.any(axis=1, keepdims=True)
    fallback_B2 = _largest_within_ratio(image_B2, ratio)
    sizes_B2 = np.where(fits_B1, sizes_B2, fallback_B2)
    anchors_B2 = np.where(fits_B1, anchors_B2, (image_B2 - fallback_B2) // 2)
    return anchors_B2, sizes_B2


def eval_windows(
    heights_B: ArrayLike, widths_B: ArrayLike, *, resize: int, crop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the windows whose resize to crop x crop is `Resize(resize)` and `CenterCrop(crop)`, up to rounding.

    Returns anchors_B2 (top, left) and sizes_B2 (height, width), int64 pixels of the source. resize: the shorter
    side's length before the central crop. Raises ValueError if the crop is larger.
    """
    if not 1 <= crop <= resize:
        raise ValueError(f"resize {resize}, crop {crop}: expected 1 <= crop <= resize")
    image_B2 = np.stack([np.asarray(heights_B), np.asarray(widths_B)], axis=1).astype(np.int64)
    resized_B2 = resize * image_B2 // image_B2.min(axis=1, keepdims=True)
    pixels_per_resized_B2 = image_B2 / resized_B2
    corners_B2 = np.rint((resized_B2 - crop) / 2.0)
    sizes_B2 = np.clip(np.rint(crop * pixels_per_resized_B2).astype(np.int64), 1, image_B2)
    anchors_B2 = np.rint(corners_B2 * pixels_per_resized_B2).astype(np.int64)
    return np.clip(anchors_B2, 0, image_B2 - sizes_B2), sizes_B2


def color_factors(
    seed: int, visits_B: ArrayLike, rows_B: ArrayLike, *, view: int, config: AugmentConfig
) -> ColorFactors:
    """Return the colour parameters of B samples, pure in (seed, visit, row, view).

    Jitter as torchvision's `ColorJitter`: factors uniform in [max(0, 1 - x), 1 + x], hue uniform in [-x, x], the
    four operations in one of their 24 orders.
    """

    def draw(purpose: Purpose, num_draws: int) -> NDArray[np.float64]:
        return uniforms(seed, visits_B, rows_B, view=view, purpose=purpose, num_draws=num_draws)

    def chosen(purpose: Purpose, probability: float) -> NDArray[np.bool_]:
        if probability == 0.0:
            return np.zeros(len(jitter_draws), dtype=bool)
        return draw(purpose, 1)[:, 0] < probability

    jitter_draws = draw(Purpose.JITTER, 6)
    strengths = np.array(config.jitter)
    low = np.append(np.maximum(0.0, 1.0 - strengths[:HUE]), -strengths[HUE])
    high = np.append(1.0 + strengths[:HUE], strengths[HUE])
    sigma_B = np.zeros(len(jitter_draws), dtype=np.float32)
    if config.blur_probability > 0.0:
        blur_draws = draw(Purpose.BLUR, 2)
        sigmas = config.blur_sigma[0] + blur_draws[:, 1] * (config.blur_sigma[1] - config.blur_sigma[0])
        sigma_B = np.where(blur_draws[:, 0] < config.blur_probability, sigmas, 0.0).astype(np.float32)
    return ColorFactors(
        jitter_B=(jitter_draws[:, 0] < config.jitter_probability) & bool(max(config.jitter) > 0.0),
        order_B4=_ORDERS_24_4[(jitter_draws[:, 1] * 24).astype(np.int64)],
        factors_B4=(low + jitter_draws[:, 2:] * (high - low)).astype(np.float32),
        grayscale_B=chosen(Purpose.GRAYSCALE, config.grayscale_probability),
        flip_B=chosen(Purpose.FLIP, config.flip_probability),
        sigma_B=sigma_B,
        solarize_B=chosen(Purpose.SOLARIZE, config.solarize_probability),
    )


def _largest_within_ratio(image_B2: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.int64]:
    """Return the size of the largest window whose width / height is within `ratio`, or nearest to it."""
    heights_B, widths_B = image_B2.T
    image_ratios_B = widths_B / heights_B
    too_tall_B, too_wide_B = image_ratios_B < ratio[0], image_ratios_B > ratio[1]
    tall_B = np.where(too_tall_B, np.rint(widths_B / ratio[0]).astype(np.int64), heights_B)
    wide_B = np.where(too_wide_B, np.rint(heights_B * ratio[1]).astype(np.int64), widths_B)
    # An image of a few pixels may round to more than it has; torchvision would pad, we stay inside.
    return np.clip(np.stack([tall_B, wide_B], axis=1), 1, image_B2)


def _check(name: str, found: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ValueError(f"AugmentConfig.{name}: found {found!r}, expected {expected}")


def kernel_size(size: int) -> int:
    """Return the width of the blur's kernel in pixels: about a tenth of the image and odd, 23 at 224 (SimCLR)."""
    return 2 * (size // 20) + 1


def blur_taps(sigma_B: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Return the weights of the blur's centre and of one side, (B, T), for images of `size` pixels; centre + 2 * side
    is 1. Where sigma is 0 the weights mean nothing."""
    radius = min(kernel_size(size) // 2, size - 1)
    weights_BT = np.exp(-0.5 * (np.arange(radius + 1) / np.maximum(sigma_B, 1e-6).astype(np.float64)[:, None]) ** 2)
    return weights_BT / (2.0 * weights_BT.sum(axis=1, keepdims=True) - weights_BT[:, :1])
