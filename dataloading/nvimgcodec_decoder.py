"""Decodes windows of images with nvImageCodec on the CPU: the decoders inside DALI, without DALI's pipeline.

A window is decoded without the rest of its image where the format allows that, and an image that fails, fails alone;
in DALI 2.4 it takes its whole batch with it, and now and then the process.
"""

# The package has no type information.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloading.encoded import Window

# Read once, as the package is imported. It would print two lines for each image that it cannot do, in colours: such
# images are Pillow's, which does them or says why.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
from nvidia import nvimgcodec

_of_thread = threading.local()


def decode_part(window: Window) -> Tensor | None:
    """Return the pixels of a window, uint8 (height, width, 3), as it is stored; None if that fails.

    The pixels lie in memory of this thread that its next call writes to. Every thread has a decoder of its own: in
    version 0.9 one that is shared by threads loses answers and corrupts memory.
    """
    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = _Decoder()
    return _of_thread.decoder.decode(window)


class _Decoder:
    """A decoder and the memory that it decodes into."""

    def __init__(self) -> None:
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )
        self._image: nvimgcodec.Image | None = None
        self._memory: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def decode(self, window: Window) -> Tensor | None:
        (top, left), (height, width) = window.anchor, window.size
        try:
            stream = nvimgcodec.CodeStream(window.encoded)
            part = stream.get_sub_code_stream(0, nvimgcodec.Region(top, left, top + height, left + width))
            again = {} if self._image is None else {"image": self._image}
            image = self._decoder.decode(part, params=self._params, **again)
        except RuntimeError:
            image = None
        if image is None or image.shape != (height, width, 3) or image.strides != (3 * width, 3, 1):
            self._image = None  # whatever state a failure left it in
            return None
        if image is not self._image or image.capacity != self._memory.size:
            # Asked for once per piece of memory: in version 0.9 every question leaks 31 bytes.
            address, _ = image.__array_interface__["data"]
            self._memory = np.ctypeslib.as_array((ctypes.c_uint8 * image.capacity).from_address(address))
            self._image = image
        return torch.from_numpy(self._memory[: height * width * 3].reshape(height, width, 3))
