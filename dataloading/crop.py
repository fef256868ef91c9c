"""Crop and resize of small images that lie in memory: batched, on the device, one window per sample.

The result is torchvision's bilinear resize with antialiasing *of the crop*: nothing outside a sample's window is
read, and minification widens the filter. (`grid_sample` does neither.) It is built from index_select and from
elementwise operations with one correctly rounded result each, so that a sample's pixels are the same bits in any batch,
with any number of threads; a batched matrix product would not promise that.

Shapes: B samples, N images in memory, H x W their pixels, C = 3 channels, S output side, K filter taps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.device_copies import to_device
from dataloading.plan import Plan


def crop_resize(
    pixels_NHWC: Tensor,
    rows_B: NDArray[np.int64],
    anchors_B2: NDArray[np.int64],
    sizes_B2: NDArray[np.int64],
    *,
    size: int,
) -> Tensor:
    """Return the windows of the given rows resized to size x size: float32 in [0, 1], (B, C, S, S), on pixels' device.

    pixels_NHWC: uint8, contiguous. anchors_B2 (top, left) and sizes_B2 (height, width) in pixels, inside the image.
    """
    num_samples, (_, height, width, channels) = len(rows_B), pixels_NHWC.shape
    device = pixels_NHWC.device
    if num_samples == 0:
        return torch.empty((0, channels, size, size), device=device)
    lines = pixels_NHWC.view(-1, width * channels)
    windows_B5 = np.concatenate([np.asarray(rows_B)[:, None], anchors_B2, sizes_B2], axis=1, dtype=np.int64)
    rows_B1, *windows = to_device(torch.from_numpy(windows_B5), device).split(1, dim=1)
    top_B1, left_B1, heights_B1, widths_B1 = windows
    tallest, widest = sizes_B2.max(axis=0).tolist()
    vertical = _taps(top_B1, heights_B1, size, tallest)
    # The factor 1/255 rides on the vertical weights: bytes become [0, 1] at no cost.
    vertical = [(rows_B1 * height + lines_BS, weights_BS / 255.0) for lines_BS, weights_BS in vertical]
    tall = _weighted_lines(lines, vertical).view(num_samples, size, width, channels)
    columns = tall.permute(0, 2, 3, 1).reshape(num_samples * width, channels * size)
    first_B1 = torch.arange(0, num_samples * width, width, device=device)[:, None]
    horizontal = _taps(left_B1, widths_B1, size, widest)
    horizontal = [(first_B1 + columns_BS, weights_BS) for columns_BS, weights_BS in horizontal]
    wide = _weighted_lines(columns, horizontal).view(num_samples, size, channels, size)
    return wide.permute(0, 2, 3, 1).contiguous()


def _taps(starts_B1: Tensor, lengths_B1: Tensor, size: int, longest: int) -> list[tuple[Tensor, Tensor]]:
    """Return the K taps of a triangle filter along one side: source pixels int64 (B, S), weights float64 (B, S).

    starts_B1, lengths_B1: int64, where the pixels are. longest: the greatest length.

    As torchvision (and Pillow): the filter has a half-width of max(1, length / size) source pixels, is cut off at the
    window's border and normalised to a sum of 1.
    """
    lengths_B1 = lengths_B1.double()
    places_S = torch.arange(size, dtype=torch.float64, device=lengths_B1.device) + 0.5
    pixels_per_output_B1 = lengths_B1 / size
    support_B1 = pixels_per_output_B1.clamp(min=1.0)
    centers_BS = pixels_per_output_B1 * places_S
    first_BS = torch.floor(centers_BS - support_B1 - 0.5) + 1.0
    num_taps = ceil(2.0 * max(1.0, longest / size))
    taps, total_BS = [], torch.zeros_like(centers_BS)
    for tap in range(num_taps):
        source_BS = first_BS + tap
        weights_BS = (1.0 - (source_BS + 0.5 - centers_BS).abs() / support_B1).clamp_(min=0.0)
        weights_BS *= (source_BS >= 0.0) & (source_BS < lengths_B1)
        inside_BS = torch.minimum(source_BS.clamp_(min=0.0), lengths_B1 - 1.0).to(torch.int64)
        taps.append((starts_B1 + inside_BS, weights_BS))
        total_BS += weights_BS
    return [(source_BS, weights_BS / total_BS) for source_BS, weights_BS in taps]


def _weighted_lines(lines: Tensor, taps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum over taps of weight * line, float32 (B * S, length of a line)."""
    total = None
    for source_BS, weights_BS in taps:
        part = lines.index_select(0, source_BS.reshape(-1)).to(torch.float32)
        part *= weights_BS.to(torch.float32).view(-1, 1)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


class MemoryCrops:
    """Crops of images that lie in memory, made where they are needed: no threads, nothing to wait for."""

    def __init__(self, pixels_NHWC: NDArray[np.uint8], size: int, device: torch.device) -> None:
        with warnings.catch_warnings():
            # torch warns that a read-only array could be written; it never is.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._pixels_NHWC = torch.from_numpy(np.ascontiguousarray(pixels_NHWC)).to(device)
        self._size = size

    def crops(self, plans: Iterator[Plan]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield each plan with its crops, float32 in [0, 1], (M, C, S, S)."""
        for plan in plans:
            windows = (plan.sources_M, plan.anchors_M2, plan.sizes_M2)
            yield plan, crop_resize(self._pixels_NHWC, *windows, size=self._size)

    def close(self) -> None:
        """Nothing to end."""
