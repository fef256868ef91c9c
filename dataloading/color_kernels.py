"""Colour augmentation on a CPU, compiled: one image after the other, in its caches, without Python's lock.

The same operations in the same order as `dataloading.color_batch`, each rounded by itself, so the bits are the same as
there. A chain of torch operations takes ten times as long on a CPU: each of them sends the image through memory, and
threads that call hundreds of them wait for each other.

Shapes: B images, C = 3 channels, H x W pixels, P = H * W, T taps of the blur (its centre and one side).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from dataloading.augment import BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, AugmentConfig, ColorFactors, blur_taps

_f = np.float32
_RED, _GREEN, _BLUE = (_f(weight) for weight in GRAY)
_ZERO, _ONE, _TWO, _THREE, _THREE_HALVES, _TINY, _BYTE = (_f(x) for x in (0.0, 1.0, 2.0, 3.0, 1.5, 1e-20, 255.0))
_NO_BYTES = np.empty((0, 3, 0, 0), dtype=np.uint8)
_UNIT = 1 << 23
"""A float32 in [1, 2] is a whole number of these parts."""


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled at its first call, and kept on disk where there is a place for that."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


def augment_colors(
    images_BCHW: NDArray[np.float32],
    factors: ColorFactors,
    config: AugmentConfig,
    bytes_BCHW: NDArray[np.uint8] | None = None,
) -> None:
    """Flip, jitter and grayscale (in the configured order), blur, solarise and normalise, in place.

    images_BCHW: in [0, 1], contiguous; with bytes_BCHW they are bytes / 255, whatever was there. factors: of B.
    """
    enabled = np.array([strength > 0.0 for strength in config.jitter])
    turns_B1 = factors.factors_B4[:, HUE].astype(np.float64)[:, None]
    shifts_B3 = (6.0 * turns_B1 - np.array([0.0, 2.0, 4.0]) + 3.0) % 6.0 - 3.0
    _augment(
        _NO_BYTES if bytes_BCHW is None else bytes_BCHW,
        images_BCHW,
        factors.flip_B,
        config.order[0] == "grayscale",
        factors.grayscale_B,
        factors.jitter_B,
        factors.order_B4,
        enabled,
        factors.factors_B4,
        shifts_B3.astype(np.float32),
        blur_taps(factors.sigma_B, images_BCHW.shape[-1]).astype(np.float32),
        factors.sigma_B > 0.0,
        factors.solarize_B,
        np.array(config.mean, dtype=np.float32),
        np.array(config.std, dtype=np.float32),
    )


def normalize(
    images_BCHW: NDArray[np.float32],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    bytes_BCHW: NDArray[np.uint8] | None = None,
) -> None:
    """Subtract the mean and divide by the standard deviation of each channel, in place; arguments as above."""
    _normalize(
        _NO_BYTES if bytes_BCHW is None else bytes_BCHW,
        images_BCHW,
        np.array(mean, dtype=np.float32),
        np.array(std, dtype=np.float32),
    )


@_compiled
def _load(bytes_CHW, image_CHW):
    bytes_P, image_P = bytes_CHW.reshape(-1), image_CHW.reshape(-1)
    for i in range(len(bytes_P)):
        image_P[i] = _f(bytes_P[i]) / _BYTE


@_compiled
def _normalize_image(image_CP, mean_3, std_3):
    for c in range(3):
        plane_P, mean, std = image_CP[c], mean_3[c], std_3[c]
        for i in range(len(plane_P)):
            plane_P[i] = (plane_P[i] - mean) / std


@_compiled
def _normalize(bytes_BCHW, images_BCHW, mean_3, std_3):
    for b in range(len(images_BCHW)):
        if len(bytes_BCHW):
            _load(bytes_BCHW[b], images_BCHW[b])
        _normalize_image(images_BCHW[b].reshape(3, -1), mean_3, std_3)


@_compiled
def _augment(
    bytes_BCHW, images_BCHW, flip_B, gray_first, gray_B, jitter_B, order_B4, enabled_4, factors_B4, shifts_B3, taps_BT,
    blur_B, solarize_B, mean_3, std_3,
):  # fmt: skip
    for b in range(len(images_BCHW)):
        image_CHW = images_BCHW[b]
        image_CP = image_CHW.reshape(3, -1)
        if len(bytes_BCHW):
            _load(bytes_BCHW[b], image_CHW)
        if flip_B[b]:
            _flip(image_CHW)
        if gray_first and gray_B[b]:
            _grayscale(image_CP)
        if jitter_B[b]:
            for slot in range(4):
                operation = order_B4[b, slot]
                factor = factors_B4[b, operation]
                if not enabled_4[operation]:
                    continue
                if operation == BRIGHTNESS:
                    _brightness(image_CP, factor)
                elif operation == CONTRAST:
                    _contrast(image_CP, factor)
                elif operation == SATURATION:
                    _saturation(image_CP, factor)
                else:
                    _hue(image_CP, shifts_B3[b])
        if not gray_first and gray_B[b]:
            _grayscale(image_CP)
        if blur_B[b]:
            _blur(image_CHW, taps_BT[b])
        if solarize_B[b]:
            _solarize(image_CP)
        _normalize_image(image_CP, mean_3, std_3)


@_compiled
def _unit(value):
    return min(max(value, _ZERO), _ONE)


@_compiled
def _luma(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@_compiled
def _flip(image_CHW):
    width = image_CHW.shape[2]
    for c in range(3):
        for y in range(image_CHW.shape[1]):
            row_W = image_CHW[c, y]
            for x in range(width // 2):
                row_W[x], row_W[width - 1 - x] = row_W[width - 1 - x], row_W[x]


@_compiled
def _grayscale(image_CP):
    red_P, green_P, blue_P = image_CP[0], image_CP[1], image_CP[2]
    for i in range(len(red_P)):
        gray = _luma(red_P[i], green_P[i], blue_P[i])
        red_P[i], green_P[i], blue_P[i] = gray, gray, gray


@_compiled
def _brightness(image_CP, factor):
    for c in range(3):
        plane_P = image_CP[c]
        for i in range(len(plane_P)):
            plane_P[i] = _unit(plane_P[i] * factor)


@_compiled
def _contrast(image_CP, factor):
    red_P, green_P, blue_P = image_CP[0], image_CP[1], image_CP[2]
    # Whole numbers add up exactly in any order, so the compiler may add many at once.
    total = 0
    for i in range(len(red_P)):
        total += np.int64((_luma(red_P[i], green_P[i], blue_P[i]) + _ONE) * _f(_UNIT))
    offset = _f(np.float64(total) / _UNIT / len(red_P) - 1.0) * (_ONE - factor)
    for c in range(3):
        plane_P = image_CP[c]
        for i in range(len(plane_P)):
            plane_P[i] = _unit(plane_P[i] * factor + offset)


@_compiled
def _saturation(image_CP, factor):
    red_P, green_P, blue_P = image_CP[0], image_CP[1], image_CP[2]
    rest = _ONE - factor
    for i in range(len(red_P)):
        gray = _luma(red_P[i], green_P[i], blue_P[i]) * rest
        red_P[i] = _unit(red_P[i] * factor + gray)
        green_P[i] = _unit(green_P[i] * factor + gray)
        blue_P[i] = _unit(blue_P[i] * factor + gray)


@_compiled
def _channel(hue, shift, chroma, base):
    return _unit(min(max(abs(abs(hue + shift) - _THREE), _ONE), _TWO) * chroma + base)


@_compiled
def _hue(image_CP, shifts_3):
    """Turn the hue; the formula is explained in `color_batch`."""
    red_P, green_P, blue_P = image_CP[0], image_CP[1], image_CP[2]
    first, second, third = shifts_3[0], shifts_3[1], shifts_3[2]
    for i in range(len(red_P)):
        red, green, blue = red_P[i], green_P[i], blue_P[i]
        smallest = min(min(red, green), blue)
        chroma = max(max(red, green), blue) - smallest
        divisor = max(chroma, _TINY)
        opponent = (green - blue) / divisor
        hue = (red - smallest) / divisor * _TWO - _ONE
        hue = abs(_THREE_HALVES - hue * (_THREE_HALVES - abs(opponent)))
        if opponent < _ZERO:
            hue = -hue
        base = smallest - chroma
        red_P[i] = _channel(hue, first, chroma, base)
        green_P[i] = _channel(hue, second, chroma, base)
        blue_P[i] = _channel(hue, third, chroma, base)


@_compiled
def _blur(image_CHW, taps_T):
    """Blur down and then across; borders are reflected. Taps are paired and added one by one."""
    _, height, width = image_CHW.shape
    radius = len(taps_T) - 1
    blurred_HW = np.empty((height, width), dtype=np.float32)
    padded_X = np.empty(width + 2 * radius, dtype=np.float32)
    for c in range(3):
        plane_HW = image_CHW[c]
        for y in range(height):
            blurred_W = blurred_HW[y]
            for x in range(width):
                blurred_W[x] = plane_HW[y, x] * taps_T[0]
            for tap in range(1, radius + 1):
                above_W, below_W = plane_HW[_reflect(y - tap, height)], plane_HW[_reflect(y + tap, height)]
                for x in range(width):
                    blurred_W[x] += (above_W[x] + below_W[x]) * taps_T[tap]
        for y in range(height):
            row_W, blurred_W = plane_HW[y], blurred_HW[y]
            for x in range(width + 2 * radius):
                padded_X[x] = blurred_W[_reflect(x - radius, width)]
            for x in range(width):
                row_W[x] = blurred_W[x] * taps_T[0]
            for tap in range(1, radius + 1):
                left_X, right_X = padded_X[radius - tap :], padded_X[radius + tap :]
                for x in range(width):
                    row_W[x] += (left_X[x] + right_X[x]) * taps_T[tap]


@_compiled
def _reflect(place, length):
    if place < 0:
        return -place
    return place if place < length else 2 * (length - 1) - place


@_compiled
def _solarize(image_CP):
    for c in range(3):
        plane_P = image_CP[c]
        for i in range(len(plane_P)):
            value = plane_P[i]
            plane_P[i] = _ONE - value if value >= _f(0.5) else value
