"""Crops of encoded images: read ahead in threads, decode ahead in a decoder, and replace what turns out damaged.

A decoder answers for every window with pixels or with a reason. Where there are none the sample is planned again with
another row; all other samples keep their pixels, so that no image depends on its batch or on what was seen before.

Shapes: B samples, M windows of a batch, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from dataloading import pillow
from dataloading.damaged import DamagedRows
from dataloading.device_copies import to_device
from dataloading.io_threads import IoThreads
from dataloading.orientation import stored_window
from dataloading.pixel_rules import PixelRules
from dataloading.plan import Plan, Planner

if TYPE_CHECKING:
    from dataloading.index import DatasetIndex

_BATCHES_READ_AHEAD = 3
_BATCHES_IN_DECODER = 3


@dataclass(frozen=True)
class Window:
    """A part of an encoded image, or the reason why there is no image."""

    encoded: bytes
    anchor: tuple[int, int]
    """Top and left, in pixels of the image as it is stored."""
    size: tuple[int, int]
    """Height and width, as it is stored."""
    is_plain: bool = False
    """Fast decoders may see it: `pillow.is_plain`."""
    failed_before: bool = False
    """A decoder that fails as a whole batch does this image by itself."""
    reason: str = ""
    orientation: int = 1
    """How what was decoded is turned: EXIF's numbers, `orientation.TURNS`."""
    rules: PixelRules | None = None


@dataclass(frozen=True)
class Decoded:
    """What became of a batch."""

    crops: Tensor
    """uint8 (M, C, S, S), on the device. Whoever collected them may write to them."""
    reasons: dict[int, str]
    """Why there are no pixels, per window (its place in the batch) that has none."""


class Decoder(Protocol):
    """Decodes batches in the order in which they were submitted, in the background."""

    def submit(self, windows: Sequence[Window]) -> None:
        """Start to decode a batch."""
        ...

    def collect(self) -> Decoded:
        """Wait for the oldest batch that was not collected yet."""
        ...

    def close(self) -> None:
        """End threads and free memory. What was not collected is given up."""
        ...


@dataclass
class _Job:
    """A batch on its way through the decoder."""

    plan: Plan
    windows: Sequence[Window]
    decoded: Decoded | None = None


class EncodedCrops:
    """The image path of encoded images; made once per run."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        index: DatasetIndex,
        planner: Planner,
        damaged: DamagedRows,
        decoder: Decoder,
        *,
        num_readers: int,
        read_together: int,
    ) -> None:
        """read(row): the encoded image; called in threads. read_together: images that a thread takes at once."""
        self._read, self._index, self._planner, self._damaged = read, index, planner, damaged
        self._repaired: Callable[[int, bytes], bytes | None] = getattr(read, "repaired", lambda row, encoded: None)
        self._decoder = decoder
        self._readers = IoThreads(num_readers, "read-images")
        self._in_decoder: deque[_Job] = deque()
        self._read_together = read_together
        self._generation = 0

    def crops(self, plans: Iterator[Plan]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield each plan as carried out with its crops, uint8 (M, C, S, S), on the device.

        A new call ends the iterators of earlier calls. Raises OSError where an image cannot be read.
        """
        self._generation += 1
        generation = self._generation
        self._collect_all()
        self._in_decoder.clear()
        reading: deque[tuple[Plan, list[Future[list[_Read]]]]] = deque()
        while generation == self._generation:
            while len(reading) < _BATCHES_READ_AHEAD and (plan := next(plans, None)):
                reading.append((plan, self._start_reading(plan)))
            while reading and len(self._in_decoder) < _BATCHES_IN_DECODER:
                plan, parts = reading.popleft()
                self._submit(plan, [read for part in parts for read in part.result()])
            if not self._in_decoder:
                return
            job = self._in_decoder.popleft()
            yield self._complete(job, self._collect(job))

    def close(self) -> None:
        """End the reading threads and the decoder; neither reads nor batches that are under way are waited for."""
        self._generation += 1
        self._readers.close()
        self._in_decoder.clear()
        self._decoder.close()

    def _start_reading(self, plan: Plan) -> list[Future[list[_Read]]]:
        # Several views of an image need it once.
        rows, together = list(dict.fromkeys(plan.sources_M.tolist())), self._read_together
        parts = [rows[start : start + together] for start in range(0, len(rows), together)]
        return [self._readers.submit(lambda part: [self._load(row) for row in part], part) for part in parts]

    def _load(self, row: int) -> _Read:
        """Read an image and check its header. Raises OSError where it cannot be read, nothing for what is wrong with
        the image. Called in threads."""
        try:
            encoded = self._read(row)
            read = self._look_at(row, encoded)
            right = self._repaired(row, encoded) if read.reason else None
            return read if right is None else self._look_at(row, right)
        except ValueError as error:
            return _Read(row, reason=str(error))

    def _look_at(self, row: int, encoded: bytes) -> _Read:
        try:
            header = pillow.read_header(encoded, self._index.rules)
        except ValueError as error:
            return _Read(row, reason=str(error))
        listed = (int(self._index.heights_N[row]), int(self._index.widths_N[row]))
        if (header.height, header.width) != listed:
            found = f"{header.width} x {header.height} pixels, the index says {listed[1]} x {listed[0]}"
            return _Read(row, reason=f"changed since it was indexed: {found}")
        return _Read(row, encoded, self._damaged.is_recorded(row), header=header, rules=self._index.rules)

    def _submit(self, plan: Plan, read: list[_Read]) -> None:
        of_row = {one.row: one for one in read}
        windows = [of_row[row].window(plan, m) for m, row in enumerate(plan.sources_M.tolist())]
        self._decoder.submit(windows)
        self._in_decoder.append(_Job(plan, windows))

    def _collect(self, job: _Job) -> Decoded:
        if job.decoded is None:
            job.decoded = self._decoder.collect()
        return job.decoded

    def _collect_all(self) -> None:
        for job in self._in_decoder:
            self._collect(job)

    def _complete(self, job: _Job, decoded: Decoded) -> tuple[Plan, Tensor]:
        """Return the plan and crops of a batch after replacing what could not be decoded."""
        plan, crops, windows = job.plan, decoded.crops, dict(enumerate(job.windows))
        reasons = self._repair(plan, windows, crops, decoded.reasons)
        failed: dict[int, set[int]] = {}
        while reasons:
            for window, reason in reasons.items():
                row = int(plan.sources_M[window])
                self._damaged.add(row, reason)
                failed.setdefault(window % len(plan.rows_B), set()).add(row)
            replaced = self._planner.plan(plan.rows_B, plan.visits_B, failed)
            changed = np.flatnonzero(replaced.sources_M != plan.sources_M).tolist()
            plan = replaced
            of_row = {row: self._load(row) for row in dict.fromkeys(plan.sources_M[changed].tolist())}
            windows = {m: of_row[int(plan.sources_M[m])].window(plan, m) for m in changed}
            reasons = self._repair(plan, windows, crops, self._decode_again(windows, crops))
        return plan, crops

    def _repair(
        self, plan: Plan, windows: Mapping[int, Window], crops: Tensor, reasons: dict[int, str]
    ) -> dict[int, str]:
        """Decode again, into the batch's crops, what failed because this machine's copy of it is not the image.

        Returns the reasons of the windows that have no pixels even so. An image is damaged where its source is.
        """
        right: dict[int, _Read | None] = {}
        repaired: dict[int, Window] = {}
        for m in reasons:
            row = int(plan.sources_M[m])
            if row not in right:
                right[row] = self._read_right(row, windows[m])
            if (read := right[row]) is not None:
                repaired[m] = read.window(plan, m)
        if not repaired:
            return reasons
        return {m: why for m, why in reasons.items() if m not in repaired} | self._decode_again(repaired, crops)

    def _read_right(self, row: int, window: Window) -> _Read | None:
        """Return the image of a window that failed, if what was read for it was another one."""
        if window.reason:
            return None  # looked into as it was read
        try:
            right = self._repaired(row, window.encoded)
        except ValueError as error:
            return _Read(row, reason=str(error))
        return None if right is None else self._look_at(row, right)

    def _decode_again(self, windows: Mapping[int, Window], crops: Tensor) -> dict[int, str]:
        """Decode windows of a batch into its crops; return why some of them have no pixels."""
        # The decoder answers in order, so what it was given before comes first.
        self._collect_all()
        self._decoder.submit(list(windows.values()))
        again, places = self._decoder.collect(), list(windows)
        crops.index_copy_(0, to_device(torch.tensor(places), crops.device), again.crops)
        return {places[window]: reason for window, reason in again.reasons.items()}


@dataclass(frozen=True)
class _Read:
    """An image that was read, or the reason why it is none."""

    row: int
    encoded: bytes = b""
    failed_before: bool = False
    reason: str = ""
    header: pillow.Header | None = None
    rules: PixelRules | None = None

    def window(self, plan: Plan, window: int) -> Window:
        (top, left), (height, width) = plan.anchors_M2[window].tolist(), plan.sizes_M2[window].tolist()
        if self.header is None:
            return Window(b"", (top, left), (height, width), reason=self.reason)
        header = self.header
        anchor, size = stored_window((top, left), (height, width), (header.height, header.width), header.orientation)
        return Window(
            self.encoded,
            anchor,
            size,
            header.is_plain,
            self.failed_before,
            orientation=header.orientation,
            rules=self.rules,
        )
