"""Resizing of 8-bit pixels on the CPU, as torchvision does it: bilinear, antialiased.

Shapes: H x W pixels, C = 3 channels, S side of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_into(pixels_HWC: Tensor, crop_CSS: Tensor) -> None:
    """Write pixels, uint8 (H, W, C), into crop_CSS, uint8 (C, S, S), resized.

    The result is that of `torchvision.transforms.v2.functional.resize` with antialias on 8-bit tensors.
    """
    _, height, width = crop_CSS.shape
    torch.ops.aten._upsample_bilinear2d_aa.out(
        pixels_HWC.permute(2, 0, 1)[None], [height, width], False, None, None, out=crop_CSS[None]
    )
