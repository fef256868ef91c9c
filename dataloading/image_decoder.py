"""Decodes windows one by one in threads, each into its place in the batch.

An image that fails, fails alone. Images that the fast decoder does not get, or cannot do, go to Pillow in the same
thread. The pixels of a window are those of Pillow's decoder and torchvision's resize, whichever decoder it was.

Shapes: M windows, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from dataloading import pillow
from dataloading.device_copies import host_memory, to_device
from dataloading.encoded import Decoded, Window
from dataloading.orientation import turned
from dataloading.read_errors import raise_if_of_memory
from dataloading.resize import resize_into
from dataloading.threads import Buffers, single_threaded_pool

DecodePart = Callable[[Window], Tensor | None]
"""Returns the pixels of a window as it is stored, uint8 (height, width, C), or None if it cannot. Called in threads."""
_TOGETHER = 4
"""Windows that a thread takes at once."""


class ImageDecoder:
    """A `Decoder` on the CPU; made once per run."""

    def __init__(self, fast: DecodePart | None, *, size: int, device: torch.device, num_threads: int) -> None:
        """fast: what decodes plain images; None leaves all of them to Pillow. device: where the crops shall be."""
        self._fast, self._size, self._device = fast, size, device
        self._threads = single_threaded_pool(num_threads, "decode-images")
        self._buffers = Buffers(torch.uint8)
        self._is_closed = False
        self._batches: deque[tuple[Tensor, list[Future[dict[int, str]]]]] = deque()

    def submit(self, windows: Sequence[Window]) -> None:
        """Start to decode a batch."""
        crops = self._memory(torch.Size((len(windows), 3, self._size, self._size)))
        parts = (range(i, min(i + _TOGETHER, len(windows))) for i in range(0, len(windows), _TOGETHER))
        self._batches.append((crops, [self._threads.submit(self._decode, windows, part, crops) for part in parts]))

    def collect(self) -> Decoded:
        """Wait for the oldest batch that was not collected yet."""
        crops, parts = self._batches.popleft()
        reasons: dict[int, str] = {}
        for part in parts:
            reasons |= part.result()
        return Decoded(to_device(crops, self._device), reasons)

    def close(self) -> None:
        """End the threads, each after the image that it decodes now."""
        self._is_closed = True
        self._threads.shutdown(cancel_futures=True)

    def _memory(self, shape: torch.Size) -> Tensor:
        if self._device.type == "cpu":
            return self._buffers.take(shape)
        # torch's own page-locked memory is used again only when the copy from it to the device is done.
        return host_memory(shape, torch.uint8, self._device)

    def _decode(self, windows: Sequence[Window], part: range, crops: Tensor) -> dict[int, str]:
        """Decode a part of a batch into its crops; return why some of it has no pixels."""
        reasons = {}
        for m in part:
            if self._is_closed:
                break  # nobody collects it any more
            if reason := windows[m].reason or self._decode_one(windows[m], crops[m]):
                reasons[m] = reason
        return reasons

    def _decode_one(self, window: Window, crop_CSS: Tensor) -> str:
        try:
            pixels_HWC = self._fast(window) if self._fast and window.is_plain else None
        except MemoryError:
            pixels_HWC = None  # what Pillow finds counts
        if pixels_HWC is not None and window.orientation != 1:
            pixels_HWC = torch.from_numpy(turned(pixels_HWC.numpy(), window.orientation))
        if pixels_HWC is None:
            try:
                pixels_HWC = pillow.decode_part(
                    window.encoded, window.anchor, window.size, window.orientation, window.rules
                )
            except Exception as error:  # a decoder that meets a damaged file raises nearly anything
                raise_if_of_memory(error, f"a window of {window.size[1]} x {window.size[0]} pixels")
                return f"cannot be decoded: {type(error).__name__}: {error}"
        resize_into(pixels_HWC, crop_CSS)
        return ""
