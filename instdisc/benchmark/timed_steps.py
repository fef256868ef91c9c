"""A side of `bench step`: so many training steps on the batches of a source."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

import torch

from dataloading import stream
from dataloading.loader import Batch, Loader


class Training(Protocol):
    """Something that trains on batches."""

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        ...


class Source(Protocol):
    """Where a side's batches come from. Nothing of it runs between `close` and the next `open`."""

    lead_in_steps: int
    """Steps of a trial before the clock runs, at least what the source makes ahead."""

    def open(self, step: int) -> Iterator[Batch]:
        """Return the batches of `step`, `step` + 1 and so on without end."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


class PreparedBatches:
    """Images made beforehand, in turn, with the row numbers that the sample stream has at each step."""

    lead_in_steps = 1

    def __init__(self, batches: list[Batch], *, num_rows: int, global_batch: int, seed: int, num_steps: int) -> None:
        self._batches, self._num_ahead = batches, self.lead_in_steps + num_steps
        self._num_rows, self._global_batch, self._seed = num_rows, global_batch, seed

    def open(self, step: int) -> Iterator[Batch]:
        """Return the batches of the next trial; their row numbers are computed here, outside the clock."""
        steps = range(step, step + self._num_ahead)
        return iter([self._batch(s) for s in steps])

    def close(self) -> None:
        """Nothing runs in the background."""

    def _batch(self, step: int) -> Batch:
        images = self._batches[step % len(self._batches)]
        rows_B = stream.rows(stream.positions(step, self._global_batch), self._num_rows, self._seed)
        return Batch(images.images_BCHW, torch.from_numpy(rows_B), images.valid_B)


class LoaderBatches:
    """The batches of our own loader."""

    lead_in_steps = 4

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._batches: Iterator[Batch] | None = None

    def open(self, step: int) -> Iterator[Batch]:
        """Start the loader at `step`."""
        self._batches = self._loader.batches(step)
        return self._batches

    def close(self) -> None:
        """End what the loader had begun."""
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._batches = None


class TimedSteps:
    """Contestant whose trial is `num_steps` steps, after the source's lead-in, which is not timed."""

    def __init__(self, training: Training, source: Source, num_steps: int, device: torch.device) -> None:
        self._training, self._source, self._num_steps, self._device = training, source, num_steps, device
        self._step = 0
        self._batches: Iterator[Batch] = iter(())

    def prepare(self) -> None:
        """Open the source and make the lead-in steps."""
        self._batches = self._source.open(self._step)
        self._advance(self._source.lead_in_steps)

    def run(self) -> None:
        """Make the timed steps."""
        self._advance(self._num_steps)

    def rest(self) -> None:
        """Close the source."""
        self._batches = iter(())
        self._source.close()

    def _advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._training.step(next(self._batches))
            self._step += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
