"""One rank's part of a checkpoint: writing its objects, and joining what all ranks wrote into the manifest's tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from cluster.manifest import ManifestError, Segment, StoredTable
from cluster.row_table import RowTable
from cluster.store import Store, check_key
from cluster.stored_object import StoredObject, in_threads, write_object
from cluster.tensor_file import serialize


def write_part(
    store: Store,
    prefix: str,
    tables: Mapping[str, RowTable],
    tensors: Mapping[str, Tensor] | None,
    *,
    block_rows: int | None,
    num_threads: int,
) -> dict[str, Any]:
    """Write a rank's rows, and the tensors if it has them, under `prefix`; return what `join_parts` reads, as JSON.

    In host memory nothing is copied; what lies on a GPU is copied to host memory first.
    """
    started = time.perf_counter()
    hosted = {_checked(name): table.on_host() for name, table in tables.items()}
    hosted_tensors = {name: tensor.detach().cpu() for name, tensor in (tensors or {}).items()}
    snapshot_s = time.perf_counter() - started

    def write_rows(job: tuple[str, int, int]) -> dict[str, Any]:
        name, start, stop = job
        key = f"{prefix}/{name}/{start:012d}-{stop:012d}.bin"
        stored = write_object(store, key, [hosted[name].bytes_of(start, stop)])
        return {"start": start, "stop": stop, **asdict(stored)}

    jobs = [(name, *rows) for name, table in hosted.items() for rows in table.segments(block_rows)]
    written = in_threads(write_rows, jobs, num_threads)
    objects: list[dict[str, Any]] = []
    if tensors is not None:
        objects.append(asdict(write_object(store, f"{prefix}/tensors.safetensors", serialize(hosted_tensors))))
    return {
        "tables": {
            name: {
                "num_rows": table.num_rows,
                "row_shape": list(table.row_shape),
                "dtype": table.dtype,
                "segments": [segment for job, segment in zip(jobs, written, strict=True) if job[0] == name],
            }
            for name, table in hosted.items()
        },
        "tensors": objects[0] if objects else None,
        "num_bytes": sum(stored["num_bytes"] for stored in [*written, *objects]),
        "snapshot_s": snapshot_s,
        "write_s": time.perf_counter() - started - snapshot_s,
    }


def join_parts(parts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, StoredTable], StoredObject]:
    """Return the tables and the tensors that the ranks' parts make up.

    ManifestError, naming the table, unless its parts have one shape and hold each row exactly once.
    """
    tables: dict[str, StoredTable] = {}
    for name in dict.fromkeys(name for part in parts for name in part["tables"]):
        found = [part["tables"][name] for part in parts if name in part["tables"]]
        kinds = [{k: table[k] for k in ("num_rows", "row_shape", "dtype")} for table in found]
        if any(kind != kinds[0] for kind in kinds):
            raise ManifestError(f"table {name!r}: the ranks do not agree on what it is: {kinds}")
        segments = sorted((Segment(**s) for table in found for s in table["segments"]), key=lambda s: s.start)
        try:
            tables[name] = StoredTable(
                num_rows=kinds[0]["num_rows"],
                row_shape=tuple(kinds[0]["row_shape"]),
                dtype=kinds[0]["dtype"],
                segments=tuple(segments),
            )
        except ManifestError as error:
            raise ManifestError(f"table {name!r}: {error}") from error
    return tables, StoredObject(**parts[0]["tensors"])


def _checked(name: str) -> str:
    if "/" in name:
        raise ValueError(f"table {name!r}: expected a name without '/'")
    check_key(name)
    return name
