"""Decodes windows of images with nvImageCodec on the CPU: the decoders inside DALI, without DALI's pipeline.

A window is decoded without the rest of its image where the format allows that, and an image that fails, fails alone;
in DALI 2.4 it takes its whole batch with it, and now and then the process.
"""

# The package has no type information.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import threading

import numpy as np
import torch
from nvidia import nvimgcodec
from torch import Tensor

from dataloading.encoded import Window

_of_thread = threading.local()


def decode_part(window: Window) -> Tensor | None:
    """Return the pixels of a window, uint8 (height, width, 3), without EXIF rotation; None if that fails.

    Every thread has a decoder of its own: in version 0.9 one that is shared by threads loses answers and corrupts
    memory.
    """
    (top, left), (height, width) = window.anchor, window.size
    try:
        stream = nvimgcodec.CodeStream(window.encoded)
        part = stream.get_sub_code_stream(0, nvimgcodec.Region(top, left, top + height, left + width))
        image = _decoder().decode(part, params=_of_thread.params)
    except RuntimeError:
        return None
    if image is None or image.shape != (height, width, 3):
        return None
    return torch.from_numpy(np.asarray(image))


def _decoder() -> nvimgcodec.Decoder:
    if not hasattr(_of_thread, "decoder"):
        _of_thread.params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        _of_thread.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )
    return _of_thread.decoder
