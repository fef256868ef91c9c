"""Reading a checkpoint: any rows of its tables, its tensors and its state, all verified against the manifest.

No worker group is needed, and nothing is written: `read_latest` may run while a training run saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.attempts import read_history
from cluster.manifest import Manifest, ManifestError, ManifestId, Segment, StoredTable, describe
from cluster.row_table import DTYPES, tensor_bytes
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError, DamagedObjectError, StoredObject, in_threads, read_object
from cluster.tensor_file import deserialize

_LISTINGS = 3


class CheckpointDeletedError(CheckpointError):
    """The run that writes this checkpoint deleted it while it was read; `read_latest` finds a newer one."""


class Checkpoint:
    """A checkpoint in a store. Rows and tensors are read when asked for, and verified.

    Reading raises `CheckpointDeletedError` where retention removed the checkpoint meanwhile, `DamagedObjectError` where
    an object is not what was written, and `StoreError` where the store fails.
    """

    def __init__(self, store: Store, manifest: Manifest, *, num_threads: int = 4) -> None:
        self.manifest = manifest
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

        Only the segments that overlap the range are read, each as a whole, because its checksum covers the whole.
        ValueError for an unknown table or a range outside it.
        """
        if name not in self.tables:
            raise ValueError(f"table: found {name!r}, expected one of {', '.join(self.tables) or 'none'}")
        table = self.tables[name]
        stop = table.num_rows if stop is None else stop
        if not 0 <= start <= stop <= table.num_rows:
            raise ValueError(f"table {name!r}: found rows [{start}, {stop}), expected them in [0, {table.num_rows})")
        rows = torch.empty((stop - start, *table.row_shape), dtype=DTYPES[table.dtype])
        target = tensor_bytes(rows)

        def fill(segment: Segment) -> None:
            first, last = max(start, segment.start), min(stop, segment.stop)
            data = memoryview(self._read(segment))
            from_byte, to_byte = ((row - segment.start) * table.row_bytes for row in (first, last))
            target[(first - start) * table.row_bytes : (last - start) * table.row_bytes] = data[from_byte:to_byte]

        in_threads(fill, table.overlapping(start, stop), self._num_threads)
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of model and optimizer, on the host."""
        return deserialize(self._read(self.manifest.tensors))

    def _read(self, stored: StoredObject) -> bytes:
        try:
            return read_object(self._store, stored)
        except DamagedObjectError as error:
            if not self._store.exists(self.manifest.id.key):
                raise CheckpointDeletedError(
                    f"the checkpoint of {describe([self.manifest.id])} in {self._store.uri} was deleted while it was "
                    "read, because the run went on to newer ones; read again"
                ) from error
            raise DamagedObjectError(f"the checkpoint of {describe([self.manifest.id])} is damaged: {error}") from error


def read_manifest(store: Store, id: ManifestId) -> Manifest:
    """Return a manifest. ObjectMissingError, ManifestError or NewerFormatError if there is none to be used."""
    manifest = Manifest.from_bytes(store.get(id.key), f"{id.key} in {store.uri}")
    if manifest.id != id:
        raise ManifestError(f"{id.key} in {store.uri} contradicts itself: it says {describe([manifest.id])}")
    return manifest


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
                return Checkpoint(store, read_manifest(store, id))
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
        manifest = read_manifest(store, id)
    except (ManifestError, ObjectMissingError) as error:
        return None, [str(error)]

    def problem_of(stored: StoredObject) -> str | None:
        try:
            read_object(store, stored)
        except DamagedObjectError as error:
            return str(error)
        return None

    problems = in_threads(problem_of, manifest.objects()[rank::world_size], num_threads)
    return manifest, [problem for problem in problems if problem]
