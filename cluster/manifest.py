"""The manifest of a checkpoint: one JSON document that names every object of it, and which manifests are valid.

Manifest keys are (attempt, step). Every attempt to run names the manifest that it starts from, so that the manifests
of a run form a tree; valid are only those on the newest attempt's chain of parents (`visible_chain`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from cluster.document_kinds import (
    ID_OR_NONE,
    MAPPING,
    MAPPINGS,
    NUMBERS,
    SHAPE,
    TEXT,
    TEXTS,
    WHOLE,
    check_json,
    require_kinds,
)
from cluster.rereading import read_again
from cluster.store import ObjectMissingError, Store, check_key
from cluster.stored_object import ALGORITHMS, StoredObject

FORMAT = 2
"""1: tables of segments only, SHA-256. 2: increments, XXH3, digests, metrics and the number of the save."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1}
"""Dtypes of tables, and the bytes of a number of each."""
INDEX_DTYPES = {"int32": 4, "int64": 8}
MAX_BYTES = 64 * 2**20
"""Of a document: some 200,000 objects, or 12 TB of rows. A larger one is refused before it takes memory."""
_KEY = re.compile(r"manifests/(\d{6,})-(\d{12,})\.json")


class ManifestError(ValueError):
    """A manifest or an attempt's record is damaged or contradicts itself."""


class NewerFormatError(ValueError):
    """A document was written by a newer version of this package."""


class ManifestId(NamedTuple):
    """Which manifest: the attempt that wrote it, and the step after which it was taken."""

    attempt: int
    step: int

    @property
    def key(self) -> str:
        return f"manifests/{self.attempt:06d}-{self.step:012d}.json"

    @property
    def objects_prefix(self) -> str:
        """The beginning of the keys of all objects that were written for this manifest."""
        return f"objects/{self.attempt:06d}/{self.step:012d}-"

    @classmethod
    def from_key(cls, key: str) -> ManifestId | None:
        """Return the id that a key stands for, None for a key of anything else."""
        match = _KEY.fullmatch(key)
        return cls(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, kw_only=True)
class Segment(StoredObject):
    """Rows [start, stop) of a table."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Increment(StoredObject):
    """`num_rows` rows, all in [start, stop), that replace those of the segments and of the increments before.

    The object holds the rows and after them their numbers, rising, little-endian, of `index_dtype`.
    """

    start: int
    stop: int
    num_rows: int
    index_dtype: str


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """A table's shape and the objects that hold its rows. ManifestError unless the segments tile it exactly.

    increments: of the saves since the segments were written, in the order of the saves.
    """

    num_rows: int
    row_shape: tuple[int, ...]
    dtype: str
    segments: tuple[Segment, ...]
    increments: tuple[Increment, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ManifestError(f"dtype: found {self.dtype!r}, expected one of {', '.join(ITEM_BYTES)}")
        place = 0
        for segment in self.segments:
            if segment.start != place or segment.stop <= place:
                raise ManifestError(
                    f"segments: found rows [{segment.start}, {segment.stop}) after row {place}, expected each row once"
                )
            if segment.num_bytes != (segment.stop - segment.start) * self.row_bytes:
                raise ManifestError(f"{segment.key}: {segment.num_bytes} bytes do not fit its rows")
            place = segment.stop
        if place != self.num_rows:
            raise ManifestError(f"segments: they end at row {place}, expected all {self.num_rows} rows")
        for increment in self.increments:
            if increment.index_dtype not in INDEX_DTYPES:
                raise ManifestError(f"{increment.key}: found {increment.index_dtype!r}, expected int32 or int64")
            fits = 0 <= increment.start < increment.stop <= self.num_rows
            fits = fits and 1 <= increment.num_rows <= increment.stop - increment.start
            row_and_number = self.row_bytes + INDEX_DTYPES[increment.index_dtype]
            if not fits or increment.num_bytes != increment.num_rows * row_and_number:
                raise ManifestError(
                    f"{increment.key}: {increment.num_rows} rows of [{increment.start}, {increment.stop}) in "
                    f"{increment.num_bytes} bytes do not fit a table of {self.num_rows} rows of {self.row_bytes} bytes"
                )

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.row_shape, self.dtype)

    @property
    def objects(self) -> tuple[Segment | Increment, ...]:
        return (*self.segments, *self.increments)

    def overlapping(self, start: int, stop: int) -> list[Segment]:
        """Return the segments that hold any of rows [start, stop)."""
        return [s for s in self.segments if max(start, s.start) < min(stop, s.stop)]

    def increments_of(self, start: int, stop: int) -> list[Increment]:
        """Return the increments that may hold any of rows [start, stop), in the order in which they apply."""
        return [i for i in self.increments if max(start, i.start) < min(stop, i.stop)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    parent: the checkpoint before it, None for the first. save: the number of the save within the attempt.
    created: UTC, ISO 8601. versions: of Python, libraries and the code. digests: of what the run must still have when
    it goes on, by name. metrics: what `Retention.best` may choose by. tensors: the safetensors object of model and
    optimizer. state: any JSON object, kept bit for bit.
    """

    attempt: int
    step: int
    parent: ManifestId | None
    created: str
    versions: Mapping[str, str]
    tables: Mapping[str, StoredTable]
    tensors: StoredObject
    state: Mapping[str, Any]
    save: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> ManifestId:
        return ManifestId(self.attempt, self.step)

    def objects(self) -> list[StoredObject]:
        """Return every object that the checkpoint needs."""
        return [self.tensors, *(stored for table in self.tables.values() for stored in table.objects)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(stored.num_bytes for stored in self.objects())

    def to_bytes(self) -> bytes:
        """Return the document. ValueError if it would not read back: state that is no JSON, fields of other kinds."""
        check_json(self.state, "state")
        data = encode_document(asdict(self))
        if len(data) > MAX_BYTES:
            raise ValueError(f"the manifest: found {len(data)} bytes, expected at most {MAX_BYTES}: state is too large")
        # Or a save would be told to be committed that nobody can read.
        Manifest.from_bytes(data, "the manifest to be written")
        return data

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read a document. ManifestError if it is damaged, NewerFormatError if it is newer; both name `where`."""
        document = decode_document(data, where)
        try:
            _check_document(document)
            document["parent"] = ManifestId(*document["parent"]) if document["parent"] else None
            document["tensors"] = StoredObject(**_of_format_2(document["tensors"]))
            document["tables"] = {name: _table(**table) for name, table in document["tables"].items()}
            manifest = cls(**document)
            for stored in manifest.objects():
                check_key(stored.key)
                if stored.checksum.partition(":")[0] not in ALGORITHMS:
                    raise ManifestError(f"checksum of {stored.key}: found {stored.checksum!r}, expected {_KNOWN}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ManifestError(f"{where} contradicts itself: {error!s:.400}") from error
        return manifest


_KNOWN = " or ".join(f"{name}:…" for name in ALGORITHMS)
_OF_OBJECT = {"key": TEXT, "num_bytes": WHOLE, "checksum": TEXT, "sha256": TEXT}
_OF_SEGMENT = {**_OF_OBJECT, "start": WHOLE, "stop": WHOLE}
_OF_INCREMENT = {**_OF_SEGMENT, "num_rows": WHOLE, "index_dtype": TEXT}
_OF_TABLE = {"num_rows": WHOLE, "row_shape": SHAPE, "dtype": TEXT, "segments": MAPPINGS, "increments": MAPPINGS}
_OF_MANIFEST = {
    **dict.fromkeys(("attempt", "step", "save"), WHOLE),
    **dict.fromkeys(("versions", "digests"), TEXTS),
    **dict.fromkeys(("state", "tensors", "tables"), MAPPING),
    "parent": ID_OR_NONE,
    "created": TEXT,
    "metrics": NUMBERS,
}


def _check_document(document: Mapping[str, Any]) -> None:
    """Raise ValueError where a document holds values of other kinds than a manifest does."""
    require_kinds(document, _OF_MANIFEST, "the manifest")
    require_kinds(document["tensors"], _OF_OBJECT, "tensors")
    for name, table in document["tables"].items():
        require_kinds(table, _OF_TABLE, f"table {name[:80]!r}")
        for segment in table["segments"]:
            require_kinds(segment, _OF_SEGMENT, "segment")
        for increment in table.get("increments", ()):
            require_kinds(increment, _OF_INCREMENT, "increment")


def _table(
    segments: list[dict[str, Any]], row_shape: list[int], increments: Sequence[dict[str, Any]] = (), **rest: Any
) -> StoredTable:
    return StoredTable(
        segments=tuple(Segment(**_of_format_2(s)) for s in segments),
        increments=tuple(Increment(**i) for i in increments),
        row_shape=tuple(row_shape),
        **rest,
    )


def _of_format_2(stored: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of an object as format 2 says it: in format 1 its checksum was called after SHA-256."""
    if "sha256" not in stored:
        return stored
    return {
        **{name: value for name, value in stored.items() if name != "sha256"},
        "checksum": f"sha256:{stored['sha256']}",
    }


def read_manifest(store: Store, id: ManifestId) -> Manifest:
    """Return a manifest. ObjectMissingError, ManifestError or NewerFormatError if there is none to be used."""
    where = f"{id.key} in {store.uri}"
    manifest = Manifest.from_bytes(read_bytes(store, id.key), where)
    if manifest.id != id:
        raise ManifestError(f"{where} contradicts itself: it says {describe([manifest.id])}")
    return manifest


def read_listed_manifest(store: Store, id: ManifestId) -> Manifest:
    """`read_manifest` of one that a listing showed: what seems to be missing or damaged is read again."""
    return read_again(store, lambda: read_manifest(store, id), (ObjectMissingError, ManifestError))


def read_bytes(store: Store, key: str) -> bytes:
    """Return the bytes of a document. ManifestError if they are more than any document has."""
    data = store.get(key, 0, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ManifestError(f"{key} in {store.uri} is damaged: it has more than {MAX_BYTES} bytes")
    return data


def row_bytes(row_shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of one row; dtype is one of `ITEM_BYTES`."""
    return math.prod(row_shape) * ITEM_BYTES[dtype]


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Return a JSON document with the format's number and a checksum of its content, which every format has."""
    content = {"format": FORMAT, **document}
    return json.dumps({**content, "sha256": _checksum(content)}, indent=1, allow_nan=False).encode()


def decode_document(data: bytes, where: str) -> dict[str, Any]:
    """Read what `encode_document` wrote, without number and checksum. Errors as in `Manifest.from_bytes`."""
    try:
        document = json.loads(data)
        intact = document.pop("sha256") == _checksum(document)
        number = document.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{where} is damaged: {len(data)} bytes that are not one of our documents") from error
    if not intact:
        raise ManifestError(f"{where} is damaged: its content differs from its checksum")
    if type(number) is not int or number < 1:
        raise ManifestError(f"{where} is damaged: found format {number!r}, expected a number from 1 to {FORMAT}")
    if number > FORMAT:
        raise NewerFormatError(
            f"{where} has format {number}, expected at most {FORMAT}: a newer version of this package wrote it; "
            "update the package to read it"
        )
    return document


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def visible_chain(parents: Mapping[int, ManifestId | None], manifests: Iterable[ManifestId]) -> list[ManifestId]:
    """Return the valid manifests, oldest first: those on the newest attempt's chain of parents.

    parents: for every attempt on that chain, the manifest that it started from (None: from nothing); the oldest may be
    left out where no attempt before them has manifests. Of an attempt's manifests, those up to the one that the next
    attempt of the chain started from are on it, all of them for the newest attempt. What an older attempt writes after
    it was left behind is therefore never visible.
    """
    if not parents:
        return []
    limits: dict[int, float] = {}
    attempt, limit = max(parents), math.inf
    while True:
        limits[attempt] = limit
        parent = parents.get(attempt)
        if parent is None:
            break
        assert parent.attempt < attempt, f"attempt {attempt} cannot start from a later one: {parent}"
        attempt, limit = parent
    return sorted(m for m in manifests if m.step <= limits.get(m.attempt, -1))


def describe(ids: Sequence[ManifestId]) -> str:
    """Return ids in words, for messages."""
    return ", ".join(f"step {step} (attempt {attempt})" for attempt, step in ids)
