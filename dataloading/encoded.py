"""Crops of encoded images: read ahead in threads, decode ahead in a decoder, and replace what turns out damaged.

Decoders fail as a whole batch (DALI does). Then the batch is halved until the damaged images are known; Pillow tries
those, and where it fails too the sample is planned again with another row. All other samples keep the decoder's pixels,
and a row that failed before is decoded by itself, so that no image depends on its batch or on what was seen before.

Shapes: B samples, M windows of a batch, C = 3 channels, S side of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dataloading import pillow
from dataloading.damaged import DamagedRows
from dataloading.plan import Plan, Planner

if TYPE_CHECKING:
    from dataloading.index import DatasetIndex

_BATCHES_READ_AHEAD = 3
_BATCHES_IN_DECODER = 3


class DecodeFailed(RuntimeError):
    """At least one image of a batch could not be decoded."""


class Decoder(Protocol):
    """Decodes batches in the order in which they were submitted, in the background."""

    def submit(
        self, encoded: list[NDArray[np.uint8]], anchors_M2: NDArray[np.int64], sizes_M2: NDArray[np.int64]
    ) -> None:
        """Start to decode the windows (top, left), (height, width) of encoded images."""
        ...

    def collect(self) -> Tensor:
        """Return the oldest batch, uint8 (M, C, S, S), on the device; may raise DecodeFailed."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Sample:
    """The encoded image of a window, or the reason why there is none."""

    encoded: bytes
    reason: str = ""
    unread: OSError | None = None
    for_decoder: bool = False
    """The decoder may see it: `pillow.is_plain`."""
    alone: bool = False
    """The row failed before: it must not cost its whole batch again."""

    @property
    def in_batch(self) -> bool:
        return self.for_decoder and not self.alone


@dataclass
class _Job:
    """A batch on its way through the decoder. crops is set once it was collected; None if it failed."""

    plan: Plan
    samples: list[_Sample]
    collected: bool = False
    crops: Tensor | None = None


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
        size: int,
        device: torch.device,
        num_readers: int,
        read_together: int,
    ) -> None:
        self._read, self._index, self._planner, self._damaged = read, index, planner, damaged
        self._decoder, self._size, self._device = decoder, size, device
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="read-images")
        self._in_decoder: deque[_Job] = deque()
        self._read_together = read_together
        self._generation = 0

    def crops(self, plans: Iterator[Plan]) -> Iterator[tuple[Plan, Tensor]]:
        """Yield each plan as carried out with its crops, uint8 (M, C, S, S), on the device.

        A new call ends the iterators of earlier calls. Raises OSError if no image of a batch can be read.
        """
        self._generation += 1
        generation = self._generation
        self._collect_all()
        self._in_decoder.clear()
        reading: deque[tuple[Plan, list[Future[list[_Sample]]]]] = deque()
        while generation == self._generation:
            while len(reading) < _BATCHES_READ_AHEAD and (plan := next(plans, None)):
                reading.append((plan, self._start_reading(plan)))
            while reading and len(self._in_decoder) < _BATCHES_IN_DECODER:
                plan, parts = reading.popleft()
                self._in_decoder.append(self._submit(plan, [s for part in parts for s in part.result()]))
            if not self._in_decoder:
                return
            job = self._in_decoder.popleft()
            self._collect(job)
            yield self._complete(job)

    def close(self) -> None:
        """End the reading threads and the decoder."""
        self._generation += 1
        self._readers.shutdown(cancel_futures=True)
        self._collect_all()
        self._in_decoder.clear()
        self._decoder.close()

    def _start_reading(self, plan: Plan) -> list[Future[list[_Sample]]]:
        sources = plan.sources_M.tolist()
        together = self._read_together
        parts = (sources[i : i + together] for i in range(0, len(sources), together))
        return [self._readers.submit(lambda part: [self._load(row) for row in part], part) for part in parts]

    def _load(self, row: int) -> _Sample:
        """Read an image and check its header; never raises for what is wrong with the image. Called in threads."""
        try:
            encoded = self._read(row)
            header = pillow.read_header(encoded)
        except OSError as error:
            return _Sample(b"", reason=f"cannot be read: {error}", unread=error)
        except ValueError as error:
            return _Sample(b"", reason=str(error))
        listed = (int(self._index.heights_N[row]), int(self._index.widths_N[row]))
        if (header.height, header.width) != listed:
            found = f"{header.width} x {header.height} pixels, the index says {listed[1]} x {listed[0]}"
            return _Sample(b"", reason=f"changed since it was indexed: {found}")
        return _Sample(
            encoded, for_decoder=pillow.is_plain(encoded, header.format), alone=self._damaged.is_recorded(row)
        )

    def _submit(self, plan: Plan, samples: list[_Sample]) -> _Job:
        unread = [sample.unread for sample in samples if sample.unread]
        if len(unread) == len(samples) > 1:
            # One missing file is damage; a whole batch of them is storage that is gone, and no reason to go on.
            raise unread[0]
        self._start_decoding(plan, samples, np.arange(len(samples)))
        return _Job(plan, samples)

    def _start_decoding(self, plan: Plan, samples: list[_Sample], chosen: NDArray[np.int64]) -> None:
        """Submit some windows; where the decoder must not see an image it gets a placeholder of one pixel."""
        shown_M = np.array([samples[m].in_batch or len(chosen) == 1 for m in chosen])
        pairs = zip(chosen, shown_M, strict=True)
        encoded = [np.frombuffer(samples[m].encoded if shown else _one_pixel(), np.uint8) for m, shown in pairs]
        anchors_M2 = np.where(shown_M[:, None], plan.anchors_M2[chosen], 0)
        self._decoder.submit(encoded, anchors_M2, np.where(shown_M[:, None], plan.sizes_M2[chosen], 1))

    def _collect(self, job: _Job) -> None:
        if not job.collected:
            job.collected = True
            try:
                job.crops = self._decoder.collect()
            except DecodeFailed:
                job.crops = None

    def _collect_all(self) -> None:
        for job in self._in_decoder:
            self._collect(job)

    def _complete(self, job: _Job) -> tuple[Plan, Tensor]:
        """Return the plan and crops of a collected job after replacing what could not be decoded."""
        plan, samples, crops = job.plan, job.samples, job.crops
        missing = np.flatnonzero([crops is None or not sample.in_batch for sample in samples])
        if crops is None:
            crops = torch.empty((len(samples), 3, self._size, self._size), dtype=torch.uint8, device=self._device)
        elif len(missing):
            crops = crops.clone()  # the decoder's memory is not ours to write to
        failed: dict[int, set[int]] = {}
        while len(missing):
            # The decoder answers in order, so what it was given before comes first.
            self._collect_all()
            for window in self._fill(plan, samples, missing, crops):
                row = int(plan.sources_M[window])
                if reason := self._fill_by_pillow(plan, samples[window], window, crops):
                    self._damaged.add(row, reason)
                    failed.setdefault(window % len(plan.rows_B), set()).add(row)
            replaced = self._planner.plan(plan.rows_B, plan.visits_B, failed)
            missing = np.flatnonzero(replaced.sources_M != plan.sources_M)
            plan = replaced
            for window in missing:
                samples[window] = self._load(int(plan.sources_M[window]))
        return plan, crops

    def _fill(self, plan: Plan, samples: list[_Sample], chosen: NDArray[np.int64], crops: Tensor) -> list[int]:
        """Decode the chosen windows into crops, halving what fails; return those that the decoder cannot do."""
        failed = [m for m in chosen.tolist() if not samples[m].for_decoder]
        parts = [np.array([m]) for m in chosen if samples[m].for_decoder and samples[m].alone]
        parts.append(np.array([m for m in chosen if samples[m].in_batch], dtype=np.int64))
        while parts:
            part = parts.pop()
            if len(part) == 0:
                continue
            self._start_decoding(plan, samples, part)
            try:
                crops[torch.from_numpy(part).to(crops.device)] = self._decoder.collect()
            except DecodeFailed:
                half = len(part) // 2
                parts += [part[:half], part[half:]] if half else []
                failed += [] if half else part.tolist()
        return failed

    def _fill_by_pillow(self, plan: Plan, sample: _Sample, window: int, crops: Tensor) -> str:
        """Decode one window with Pillow; return the reason if that fails too, else an empty string."""
        if sample.reason:
            return sample.reason
        where = (plan.anchors_M2[window], plan.sizes_M2[window])
        try:
            crop_CSS = pillow.decode_crop(sample.encoded, *where, self._size)
        except Exception as error:  # a decoder that meets a damaged file raises nearly anything
            return f"cannot be decoded: {type(error).__name__}: {error}"
        crops[window] = crop_CSS.to(crops.device)
        return ""


@cache
def _one_pixel() -> bytes:
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
