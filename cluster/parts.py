"""The parts that ranks wrote of a save, joined into the tables of its manifest, and how far increments may grow.

Without torch: the coordinator needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from cluster.manifest import Increment, Manifest, ManifestError, Segment, StoredTable
from cluster.stored_object import StoredObject

MAX_INCREMENT_SHARE = 0.5
"""Increments of more than this share of the whole tables make a restore slow: a new base is written."""
MAX_INCREMENTS = 4096
"""Increment objects of a table before a new base."""


def join_parts(
    parts: Sequence[Mapping[str, Any]], previous: Manifest | None
) -> tuple[dict[str, StoredTable], StoredObject]:
    """Return the tables and the tensors that the ranks' parts make up, with what increments add to: `previous`.

    ManifestError, naming the table, unless its parts have one shape and hold each row exactly once, or add to the same
    checkpoint.
    """
    bases = {tuple(part["since"]) if part["since"] else None for part in parts}
    if len(bases) > 1 or (bases != {None} and bases != {previous.id if previous else None}):
        raise ManifestError(
            f"the ranks' parts add to {', '.join(map(str, bases))}, the checkpoint before is "
            f"{previous.id if previous else None}"
        )
    tables: dict[str, StoredTable] = {}
    for name in dict.fromkeys(name for part in parts for name in part["tables"]):
        found = [part["tables"][name] for part in parts if name in part["tables"]]
        kinds = [(table["num_rows"], table["row_shape"], table["dtype"], "segments" in table) for table in found]
        if any(kind != kinds[0] for kind in kinds):
            raise ManifestError(f"table {name!r}: the ranks do not agree on what it is: {kinds}")
        try:
            tables[name] = _joined(found, previous.tables.get(name) if previous else None)
        except ManifestError as error:
            raise ManifestError(f"table {name!r}: {error}") from error
    return tables, StoredObject(**parts[0]["tensors"])


def _joined(found: Sequence[Mapping[str, Any]], before: StoredTable | None) -> StoredTable:
    about = {
        "num_rows": found[0]["num_rows"],
        "row_shape": tuple(found[0]["row_shape"]),
        "dtype": found[0]["dtype"],
    }
    if "segments" in found[0]:
        segments = sorted((Segment(**s) for table in found for s in table["segments"]), key=lambda s: s.start)
        return StoredTable(segments=tuple(segments), **about)
    if before is None or (before.num_rows, before.row_shape, before.dtype) != tuple(about.values()):
        raise ManifestError(f"increments to another table than the checkpoint before has: {about}")
    increments = sorted((Increment(**i) for table in found for i in table["increments"]), key=lambda i: i.start)
    for first, second in pairwise(increments):
        if second.start < first.stop:
            raise ManifestError(f"increments: {first.key} and {second.key} overlap")
    return StoredTable(segments=before.segments, increments=(*before.increments, *increments), **about)


Kind: TypeAlias = tuple[int, tuple[int, ...], str]
"""(rows, shape of a row, dtype) of a table."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How much increments have added to the whole tables of a checkpoint.

    kinds: of each table.
    """

    segment_bytes: int
    increment_bytes: int
    num_increments: int
    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, manifest: Manifest) -> Growth:
        tables = manifest.tables.values()
        return cls(
            segment_bytes=sum(segment.num_bytes for table in tables for segment in table.segments),
            increment_bytes=sum(increment.num_bytes for table in tables for increment in table.increments),
            num_increments=max((len(table.increments) for table in tables), default=0),
            kinds={name: (t.num_rows, t.row_shape, t.dtype) for name, t in manifest.tables.items()},
        )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Growth:
        """Return what `asdict` made, after it passed through JSON."""
        kinds = {name: (rows, tuple(shape), dtype) for name, (rows, shape, dtype) in document["kinds"].items()}
        return cls(**{**document, "kinds": kinds})

    def allows_increment(self, kinds: Mapping[str, Kind], rows_written: float | None) -> bool:
        """Whether a save of tables of these kinds may add to this checkpoint; else it stores whole ones, a new base.

        rows_written: at most so many rows of each table were written since, None if nobody knows.
        """
        if any(self.kinds.get(name) != kind for name, kind in kinds.items()):
            return False
        num_rows = max([1, *(rows for rows, _, _ in kinds.values())])
        expected = 0.0 if rows_written is None else self.segment_bytes * min(1.0, rows_written / num_rows)
        few = self.num_increments < MAX_INCREMENTS
        return few and self.increment_bytes + expected <= MAX_INCREMENT_SHARE * self.segment_bytes
