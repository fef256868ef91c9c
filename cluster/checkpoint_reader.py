"""Reading a checkpoint: any rows of its tables, its tensors and its state, all verified against the manifest.

No worker group is needed, and nothing is written: `read_latest` may run while a training run saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster.attempts import read_history
from cluster.manifest import (
    Increment,
    Manifest,
    ManifestError,
    ManifestId,
    Segment,
    StoredTable,
    describe,
    read_listed_manifest,
)
from cluster.row_table import DTYPES, row_view
from cluster.shared_reads import SharedReads
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import (
    CheckpointError,
    DamagedObjectError,
    StoredObject,
    read_into,
    read_object,
)
from cluster.tensor_file import deserialize
from cluster.threads import in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")
_LISTINGS = 3
_LOOKED_UP_BYTES = 2**30
"""Memory for more than this is taken only for rows that the store has, by the sizes of the objects."""


class CheckpointDeletedError(CheckpointError):
    """The run that writes this checkpoint deleted it while it was read; `read_latest` finds a newer one."""


class Checkpoint:
    """A checkpoint in a store. Rows and tensors are read when asked for, and verified.

    Reading raises `CheckpointDeletedError` where retention removed the checkpoint meanwhile, `DamagedObjectError` where
    an object is not what was written, and `StoreError` where the store fails. shared: where ranks of one machine read
    the tensors once.
    """

    def __init__(
        self, store: Store, manifest: Manifest, *, num_threads: int = 4, shared: SharedReads | None = None
    ) -> None:
        self.manifest = manifest
        self._shared = shared
        self._store = store
        self._num_threads = num_threads

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def attempt(self) -> int:
        return self.manifest.attempt

    @property
    def state(self) -> Mapping[str, Any]:
        return self.manifest.state

    @property
    def tables(self) -> Mapping[str, StoredTable]:
        return self.manifest.tables

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop) of a table, on the host, in the table's dtype; to its end by default.

        Only the objects that overlap the range are read, each as a whole, because its checksum covers the whole.
        ValueError for an unknown table or a range outside it.
        """
        table = self._table(name)
        stop = table.num_rows if stop is None else stop
        if not 0 <= start <= stop <= table.num_rows:
            raise ValueError(f"table {name!r}: found rows [{start}, {stop}), expected them in [0, {table.num_rows})")
        if (stop - start) * table.row_bytes > _LOOKED_UP_BYTES:
            self._require_sizes(table.overlapping(start, stop))
        rows = torch.empty((stop - start, *table.row_shape), dtype=DTYPES[table.dtype])
        self.read_rows(name, start, rows)
        return rows

    def read_rows(self, name: str, start: int, into: Tensor) -> None:
        """Read the rows from `start` on into a tensor (R, ...) of the table's dtype, on any device.

        In host memory nothing but ranges of objects, and increments, take memory beside it. After an error its content
        is undefined. Raises ValueError where the tensor does not fit the table.
        """
        table = self._table(name)
        found = tuple(into.shape[1:]), str(into.dtype).removeprefix("torch.")
        if found != (table.row_shape, table.dtype) or not 0 <= start <= start + len(into) <= table.num_rows:
            raise ValueError(
                f"table {name!r}: found memory for rows [{start}, {start + len(into)}) of {found}, expected them in "
                f"[0, {table.num_rows}) of {(table.row_shape, table.dtype)}"
            )
        target = _Target(into, start)

        def fill(segment: Segment) -> None:
            view = target.view(segment.start, segment.stop)
            if view is not None:
                with self._explained():
                    read_into(self._store, segment, view, max(0, start - segment.start) * table.row_bytes)
                return
            data = np.frombuffer(self._read(segment), np.uint8)
            target.write(segment.start, data.reshape(segment.stop - segment.start, table.row_bytes))

        in_threads(fill, table.overlapping(start, target.stop), self._num_threads)
        increments = table.increments_of(start, target.stop)
        for increment, data in _in_order(self._read, increments, self._num_threads):
            target.replace(*_decoded(increment, data, table.row_bytes))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of model and optimizer, on the host."""
        with self._explained():
            stored, num_threads = self.manifest.tensors, self._num_threads
            data = (
                self._shared.read(stored, num_threads)
                if self._shared
                else read_object(self._store, stored, num_threads)
            )
        try:
            return deserialize(data)
        except ValueError as error:
            raise DamagedObjectError(
                f"object {self.manifest.tensors.key} in {self._store.uri} is not in the safetensors format: {error}"
            ) from error

    def _table(self, name: str) -> StoredTable:
        if name not in self.tables:
            raise ValueError(f"table: found {name!r}, expected one of {', '.join(self.tables) or 'none'}")
        return self.tables[name]

    def _require_sizes(self, segments: Sequence[Segment]) -> None:
        """Raise DamagedObjectError unless all segments have their sizes, before memory is taken for what they hold."""
        with self._explained():
            for folder in dict.fromkeys(segment.key.rpartition("/")[0] for segment in segments):
                sizes = dict(self._store.list_sizes(f"{folder}/"))
                for segment in segments:
                    if segment.key.startswith(f"{folder}/") and sizes.get(segment.key) != segment.num_bytes:
                        raise DamagedObjectError(
                            f"object {segment.key} in {self._store.uri} is missing or does not have its "
                            f"{segment.num_bytes} bytes"
                        )

    def _read(self, stored: StoredObject) -> bytearray:
        with self._explained():
            return read_object(self._store, stored)

    def _explained(self) -> _Explained:
        return _Explained(self._store, self.manifest.id)


class _Explained:
    """Says whose object is damaged, or that its checkpoint is no longer there."""

    def __init__(self, store: Store, id: ManifestId) -> None:
        self._store, self._id = store, id

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, DamagedObjectError):
            return
        if not self._store.exists(self._id.key):
            raise CheckpointDeletedError(
                f"the checkpoint of {describe([self._id])} in {self._store.uri} was deleted while it was "
                "read, because the run went on to newer ones; read again"
            ) from error
        raise DamagedObjectError(f"the checkpoint of {describe([self._id])} is damaged: {error}") from error


class _Target:
    """Rows [start, stop) of a table, on their way into a tensor."""

    def __init__(self, into: Tensor, start: int) -> None:
        self.start, self.stop = start, start + len(into)
        self._into = into
        in_place = into.device.type == "cpu" and into.is_contiguous() and len(into) > 0
        self._bytes_RX = row_view(into) if in_place else None

    def view(self, start: int, stop: int) -> memoryview | None:
        """Return the memory of those of rows [start, stop) that have a place here; None outside host memory."""
        if self._bytes_RX is None:
            return None
        return self._bytes_RX[max(0, start - self.start) : stop - self.start].reshape(-1).data

    def write(self, start: int, rows_PX: np.ndarray) -> None:
        """Write those of the rows from `start` on that have a place here."""
        first, last = max(start, self.start), min(start + len(rows_PX), self.stop)
        self.replace(np.arange(first, last), rows_PX[first - start : last - start])

    def replace(self, numbers_P: np.ndarray, rows_PX: np.ndarray) -> None:
        """Write the rows with these numbers, rising, those of them that have a place here."""
        low, high = np.searchsorted(numbers_P, (self.start, self.stop))
        places_P, rows_PX = numbers_P[low:high] - self.start, rows_PX[low:high]
        if len(places_P) == 0:
            return
        if self._bytes_RX is not None:
            self._bytes_RX[places_P] = rows_PX
            return
        values_P = torch.from_numpy(rows_PX.copy()).view(self._into.dtype).view(-1, *self._into.shape[1:])
        self._into[torch.from_numpy(places_P).to(self._into.device)] = values_P.to(self._into.device)


def _decoded(increment: Increment, data: bytearray, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers, int64 (P,), and the rows, bytes (P, X), of an increment. DamagedObjectError if odd."""
    at = increment.num_rows * row_bytes
    rows_PX = np.frombuffer(data, np.uint8, count=at).reshape(increment.num_rows, row_bytes)
    numbers_P = np.frombuffer(data, np.dtype(increment.index_dtype).newbyteorder("<"), offset=at).astype(np.int64)
    rising = bool((np.diff(numbers_P) > 0).all())
    if not rising or numbers_P[0] < increment.start or numbers_P[-1] >= increment.stop:
        raise DamagedObjectError(
            f"increment {increment.key} holds other rows than [{increment.start}, {increment.stop}) in rising order"
        )
    return numbers_P, rows_PX


def _in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) in order, computed in threads, no more than `num_threads` ahead."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="checkpoint") as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= num_threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def read_latest(store: Store) -> Checkpoint | None:
    """Return the newest valid checkpoint whose manifest can be read, None if the run has none.

    CheckpointError if there are manifests but none can be read, NewerFormatError if one is of a newer format.
    """
    problems: list[str] = []
    for _ in range(_LISTINGS):
        chain = read_history(store).chain
        problems.clear()
        for id in reversed(chain):
            try:
                return Checkpoint(store, read_listed_manifest(store, id))
            except (ManifestError, ObjectMissingError) as error:
                problems.append(str(error))
        if not chain:
            return None
        # All of them vanished or are damaged: a running training may have replaced them since they were listed.
    raise CheckpointError(f"no manifest of {store.uri} can be read: {'; '.join(problems)}")


def verify_share(
    store: Store, id: ManifestId, rank: int, world_size: int, num_threads: int
) -> tuple[Manifest | None, list[str]]:
    """Read a manifest and every `world_size`-th of its objects; return it and what is damaged, in sentences.

    None if the manifest itself is damaged. Raises StoreError if the store fails, NewerFormatError as `read_latest`.
    """
    try:
        manifest = read_listed_manifest(store, id)
    except (ManifestError, ObjectMissingError) as error:
        return None, [str(error)]

    def problem_of(stored: StoredObject) -> str | None:
        try:
            read_into(store, stored, None)
        except DamagedObjectError as error:
            return str(error)
        return None

    problems = in_threads(problem_of, manifest.objects()[rank::world_size], num_threads)
    return manifest, [problem for problem in problems if problem]
