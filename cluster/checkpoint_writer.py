"""One rank's part of a checkpoint: writing the objects of its snapshot.

Shapes: R rows of this rank, P rows of one piece, X bytes of a row.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.manifest import ManifestId
from cluster.row_guard import FrozenRows
from cluster.row_table import BLOCK_BYTES, RowTable
from cluster.snapshot import Snapshot
from cluster.store import Store
from cluster.stored_object import StoredObject
from cluster.tensor_file import serialize
from cluster.uploads import MEMORY_BYTES, Pace, Uploads

PIECE_BYTES = 8 * 2**20
"""Bytes that are copied while the owner of the rows cannot write."""
INCREMENT_BYTES = 32 * 2**20
"""Bytes of rows in one increment object, about."""


def write_part(
    store: Store,
    prefix: str,
    snapshot: Snapshot,
    *,
    since: ManifestId | None,
    block_rows: int | None,
    num_threads: int,
    pace: Pace,
) -> dict[str, Any]:
    """Write a rank's snapshot under `prefix`; return what `parts.join_parts` reads, as JSON.

    since: the checkpoint to which tables that know when their rows were written add increments; None writes whole
    tables. Beside the rows it takes some 128 MiB of memory and an eighth of theirs, at most a block for each thread.
    """
    started_s = time.perf_counter()
    tables: dict[str, dict[str, Any]] = {}
    pending: list[tuple[list[dict[str, Any]], dict[str, Any], Future[StoredObject]]] = []
    memory_bytes = _memory_bytes(snapshot, num_threads)
    with Uploads(store, num_threads=num_threads, pace=pace, memory_bytes=memory_bytes) as uploads:
        tensors = _submit_tensors(uploads, prefix, snapshot)
        for name, table in snapshot.tables.items():
            frozen = snapshot.frozen[name]
            if since is None or table.last_step is None:
                kind, written = "segments", _write_segments(uploads, f"{prefix}/{name}", table, frozen, block_rows)
            else:
                kind, written = "increments", _write_increments(uploads, f"{prefix}/{name}", table, frozen, since.step)
            objects: list[dict[str, Any]] = []
            tables[name] = {
                "num_rows": table.num_rows,
                "row_shape": list(table.row_shape),
                "dtype": table.dtype,
                kind: objects,
            }
            pending += [(objects, about, future) for about, future in written]
        for objects, about, future in pending:
            objects.append({**about, **asdict(future.result())})
        stored_tensors = None if tensors is None else asdict(tensors.result())
    return {
        "tables": tables,
        "tensors": stored_tensors,
        "state": snapshot.state if stored_tensors else None,
        "metrics": dict(snapshot.metrics),
        "since": since,
        "snapshot_s": snapshot.seconds,
        "write_s": time.perf_counter() - started_s,
    }


def _memory_bytes(snapshot: Snapshot, num_threads: int) -> int:
    """Return the bytes of objects that may be in memory at once.

    With a block for each thread hardly any of them waits; for few rows that would be too much.
    """
    rows_bytes = sum(table.rows.numel() * table.rows.itemsize for table in snapshot.tables.values())
    return max(MEMORY_BYTES, min(MEMORY_BYTES + rows_bytes // 8, num_threads * BLOCK_BYTES))


def _submit_tensors(uploads: Uploads, prefix: str, snapshot: Snapshot) -> Future[StoredObject] | None:
    if snapshot.tensors is None:
        return None
    parts = serialize(snapshot.tensors)
    num_bytes = sum(len(part) for part in parts)
    uploads.reserve(num_bytes)
    return uploads.submit(f"{prefix}/tensors.safetensors", parts, num_bytes)


def _write_segments(
    uploads: Uploads, prefix: str, table: RowTable, frozen: FrozenRows, block_rows: int | None
) -> list[tuple[dict[str, Any], Future[StoredObject]]]:
    written = []
    piece_rows = max(1, PIECE_BYTES // table.row_bytes)
    for start, stop in table.segments(block_rows):
        num_bytes = (stop - start) * table.row_bytes
        uploads.reserve(num_bytes)
        # numpy asks for huge pages: with small ones the kernel takes longer to make them than the rows to be copied.
        block_PX = np.empty((stop - start, table.row_bytes), np.uint8)
        for at in range(0, stop - start, piece_rows):
            to = min(at + piece_rows, stop - start)
            frozen.read(start - table.start + to, block_PX[at:to])
        block = block_PX.reshape(-1).data
        del block_PX
        future = uploads.submit(f"{prefix}/{start:012d}-{stop:012d}.bin", [block], num_bytes)
        del block  # or it would stay in memory while the next one waits for room
        written.append(({"start": start, "stop": stop}, future))
    return written


def _write_increments(
    uploads: Uploads, prefix: str, table: RowTable, frozen: FrozenRows, since: int
) -> list[tuple[dict[str, Any], Future[StoredObject]]]:
    """Write the rows of step `since` and later, and their numbers, in objects of about 32 MiB."""
    index_dtype = "int32" if table.num_rows <= 2**31 else "int64"
    piece_rows = max(1, PIECE_BYTES // table.row_bytes)
    reserved = INCREMENT_BYTES + PIECE_BYTES + (INCREMENT_BYTES // table.row_bytes + piece_rows) * 8
    written = []
    block, numbers = bytearray(), []
    for at in range(0, len(frozen), piece_rows):
        to = min(at + piece_rows, len(frozen))
        places_P, rows_PX = frozen.read_written(to, since)
        if len(places_P) and not block:
            uploads.reserve(reserved)
        if len(places_P):
            block += rows_PX.reshape(-1).data
            numbers.append(places_P + table.start)
        if block and (len(block) >= INCREMENT_BYTES or to == len(frozen)):
            numbers_P = np.concatenate(numbers)
            block += numbers_P.astype(np.dtype(index_dtype).newbyteorder("<")).data
            start, stop = int(numbers_P[0]), int(numbers_P[-1]) + 1
            about = {"start": start, "stop": stop, "num_rows": len(numbers_P), "index_dtype": index_dtype}
            future = uploads.submit(f"{prefix}/{start:012d}-{stop:012d}.rows", [block], reserved)
            written.append((about, future))
            block, numbers = bytearray(), []
    return written
