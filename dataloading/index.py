"""The dataset index: which image is which row, and whether a list of images is still the same one.

A row number 0..N-1 is the image's identity in the memory bank, so it must not change while a run lives. The digest
covers the whole list; a run compares it when it continues, and `DatasetIndex.difference` says what changed.

Shapes: N rows of the dataset, H height, W width, C = 3 colour channels.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataloading import notes as told
from dataloading.difference import describe_difference
from dataloading.notes import Note
from dataloading.numerals import whole_number
from dataloading.pixel_rules import PixelRules

_FORMAT = "instdisc dataset index 1"
CHECKSUM_BYTES = 16
_OFFSET = "offset"
_COLUMNS = ("name", "num_bytes", "height", "width", "label", "bad")


class DatasetError(ValueError):
    """The images cannot be used as they are; the message says what, where, found, expected and what to do."""


class DatasetChanged(DatasetError):
    """The images are no longer those of the index that was handed over; the message says what differs."""


class NoSplit(DatasetError):
    """There are images, but none of the split that was asked for."""


MAX_CLASSES = 1 << 20
"""A larger label than this is taken for a mistake: what is counted per class would need all memory."""


class Names(Sequence[str]):
    """The names of the rows in one arrow array: some 10 bytes a row beyond the text, where a str costs 50.

    Stored as the bytes of the file system, because a file's name on Linux need not be valid UTF-8.
    """

    def __init__(self, array: pa.LargeBinaryArray) -> None:
        self.array = array

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Return `names` as they are if they are Names already, else a copy in an arrow array."""
        if isinstance(names, Names):
            return names
        return cls(pa.array([os.fsencode(name) for name in names], pa.large_binary()))

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Names: ...
    def __getitem__(self, row: int | slice) -> str | Names:
        if isinstance(row, slice):
            return Names(self.array[row])
        return os.fsdecode(self.array[int(row)].as_py())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and self.array.equals(other.array)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Names({len(self)}: {', '.join(self[:3])}{', …' if len(self) > 3 else ''})"


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """The list of a dataset's images; row number = position in it."""

    source: str
    """Where the images come from, for people: kind, place and split. Not part of the digest: data may move."""
    names: Sequence[str]
    """Per row: the path under the data root, or the file and the number within it."""
    heights_N: NDArray[np.int32]
    """Of the image as `rules` show it; 0 where the header is unreadable."""
    widths_N: NDArray[np.int32]
    labels_N: NDArray[np.int64] | None
    """For evaluation only, never used in training; None where not every image has one."""
    class_names: tuple[str, ...]
    bad_N: NDArray[np.bool_]
    """True where the image cannot be used; `reasons` says why."""
    digest: str
    """sha256 (hex) of the list: `list_digest`."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Per bad row, why it is bad."""
    num_bytes_N: NDArray[np.int64] | None = None
    """Size of each encoded image (of its pixels, for a source in memory); None where it was not looked at."""
    files: dict[str, int] = field(default_factory=dict)
    """Byte sizes of the files that hold many images (parquet, tars); empty for other kinds."""
    versions: dict[str, str] = field(default_factory=dict)
    """What tells each of `files` apart from another one of its name and size, where the storage says so."""
    offsets_N: NDArray[np.int64] | None = None
    """Where each image begins in its tar; None for other kinds, and where an earlier version listed the tars."""
    asked: str = ""
    """Which images were asked for, `dataloading.sources.question`; "" where an earlier version listed them."""
    rules: PixelRules = field(default_factory=PixelRules)
    """How pixels are made of the images' bytes, which decides sizes and what is bad."""
    notes: tuple[Note, ...] = ()
    """What was taken for what, what is left out or unused, and why there are no labels."""

    @property
    def num_rows(self) -> int:
        return len(self.names)

    def with_notes(self, notes: tuple[Note, ...]) -> DatasetIndex:
        """Return this index with what is told of the images today."""
        return self if notes == self.notes else replace(self, notes=notes)

    def difference(self, current: DatasetIndex) -> str | None:
        """Return a sentence that says how `current` differs from this index, None if it does not.

        Labels count here though they are no part of the digest; fields that one side does not know do not.
        """
        return describe_difference(self, current)

    def save(self, path: str | Path) -> None:
        """Write the index as a parquet file, whole or not at all."""
        unfinished = Path(f"{path}.{os.getpid()}.tmp")
        with open(unfinished, "wb") as file:
            file.write(self.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def to_bytes(self) -> bytes:
        """Return the parquet file that `save` writes."""
        names = Names.of(self.names)
        unknown = pa.nulls(len(names), pa.int64())
        columns = [
            names.array,
            unknown if self.num_bytes_N is None else pa.array(self.num_bytes_N, pa.int64()),
            pa.array(self.heights_N, pa.int32()),
            pa.array(self.widths_N, pa.int32()),
            unknown if self.labels_N is None else pa.array(self.labels_N, pa.int64()),
            pa.array(self.bad_N, pa.bool_()),
        ]
        about = {
            "format": _FORMAT,
            "source": self.source,
            "class_names": self.class_names,
            "digest": self.digest,
            "reasons": {str(row): reason for row, reason in self.reasons.items()},
            "files": self.files,
            "versions": self.versions,
            "asked": self.asked,
            "pixels": asdict(self.rules),
            "notes": [note.to_plain() for note in self.notes],
        }
        columns_named: list[str] = [*_COLUMNS]
        if self.offsets_N is not None:
            columns.append(pa.array(self.offsets_N, pa.int64()))
            columns_named.append(_OFFSET)
        table = pa.table(columns, names=columns_named).replace_schema_metadata({"index": json.dumps(about)})
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd")
        return file.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> DatasetIndex:
        """Read an index that `save` wrote. Raises DatasetError for any other file, OSError where it is missing."""
        return cls.from_bytes(Path(path).read_bytes(), path)

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path) -> DatasetIndex:
        """Return the index in the bytes of a file that `save` wrote. path: its place, for messages. Raises DatasetError
        for anything else."""
        try:
            # One file read as one file: a path such as "split=train/index.parquet" adds no columns.
            table = pq.ParquetFile(pa.BufferReader(data)).read()
            about = json.loads((table.schema.metadata or {}).get(b"index", b"{}"))
        except (pa.ArrowException, ValueError) as error:
            raise _not_an_index(path, str(error)) from error
        if about.get("format") != _FORMAT or tuple(table.column_names) not in (_COLUMNS, (*_COLUMNS, _OFFSET)):
            raise _not_an_index(path, f"format {about.get('format')!r}, columns {table.column_names}")
        column = {name: table.column(name).combine_chunks() for name in _COLUMNS}
        return cls(
            source=about["source"],
            names=Names(column["name"]),
            heights_N=_numpy(column["height"], np.int32),
            widths_N=_numpy(column["width"], np.int32),
            labels_N=None if column["label"].null_count else _numpy(column["label"], np.int64),
            class_names=tuple(about["class_names"]),
            bad_N=_numpy(column["bad"], np.bool_),
            digest=about["digest"],
            reasons={whole_number(row): reason for row, reason in about["reasons"].items()},
            num_bytes_N=None if column["num_bytes"].null_count else _numpy(column["num_bytes"], np.int64),
            files=about["files"],
            versions=about.get("versions", {}),
            asked=about.get("asked", ""),
            offsets_N=_numpy(table.column(_OFFSET), np.int64) if _OFFSET in table.column_names else None,
            rules=PixelRules.stated(about.get("pixels")),
            notes=told.from_plain(about.get("notes", ())),
        )


class Reader(Protocol):
    """Reads encoded images by their row, as all sources of `dataloading.sources` do."""

    def __call__(self, row: int) -> bytes:
        """Return the encoded image of a row. May be called from many threads. Raises OSError where it cannot be read,
        ValueError where it can be seen not to be the image that is meant."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether a read may take many milliseconds, so that many should be under way."""
        ...

    def subset(self, rows_R: NDArray[np.int64]) -> Reader:
        """Return the reader of some rows, numbered from 0; it is picklable and carries no more than it needs."""
        ...


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """How the images of a dataset lie in shards."""

    numbers_S: NDArray[np.int64]
    """Numbers of the shards that hold images, as the reader counts them."""
    num_rows_S: NDArray[np.int64]
    """Images of each, at least 1."""
    row_of_place_N: NDArray[np.integer] | None
    """Row of the i-th image, counted through the shards; None where the shards hold the rows in order."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with fixed row numbers: either all pixels in memory, or a way to read one encoded image."""

    index: DatasetIndex
    pixels_NHWC: NDArray[np.uint8] | None
    """Small images of one size, RGB; rows that `index.bad_N` marks are black. None for other images."""
    read: Reader | Callable[[int], bytes] | None
    """The encoded image of a row; may be called from many threads, raises OSError. None where pixels are held."""
    shards: ShardLayout | None = None
    """None for images that are not packed."""

    @property
    def looked_at(self) -> str:
        """How it is known which images are damaged: "pixels" decoded now, or at "packing"; else by "headers" alone."""
        return "pixels" if self.pixels_NHWC is not None else "headers" if self.shards is None else "packing"


def dataset_of_pixels(
    source: str,
    pixels_NHWC: NDArray[np.uint8],
    labels_N: NDArray[np.int64] | None,
    class_names: Sequence[str],
    names: Iterable[str],
) -> Dataset:
    """Return the dataset of images that are in memory anyway; its digest covers the pixels. C must be 3."""
    num_rows, height, width, channels = pixels_NHWC.shape
    assert channels == 3, f"{source}: found {channels} channels, expected 3"
    kept = Names.of(names)
    sizes_N = np.full(num_rows, height * width * channels, dtype=np.int64)
    content = hashlib.sha256(np.ascontiguousarray(pixels_NHWC).data).digest()
    index = DatasetIndex(
        source=source,
        names=kept,
        heights_N=np.full(num_rows, height, dtype=np.int32),
        widths_N=np.full(num_rows, width, dtype=np.int32),
        labels_N=labels_N,
        class_names=tuple(class_names),
        bad_N=np.zeros(num_rows, dtype=np.bool_),
        digest=list_digest(kept, sizes_N, content),
        num_bytes_N=sizes_N,
    )
    return Dataset(index, pixels_NHWC, None)


def require_same(where: str | Path, saved: DatasetIndex | None, current: DatasetIndex) -> None:
    """Raise DatasetChanged where the images at `where` are no longer those of a saved index, if there is one."""
    if saved is not None and (difference := saved.difference(current)):
        raise DatasetChanged(
            f"{where} is not what its index says: {difference}. Restore the images, or index them again for a new run"
        )


def image_checksum(encoded: bytes | memoryview) -> bytes:
    """Return the first 16 bytes of the SHA-256 of an encoded image."""
    return hashlib.sha256(encoded).digest()[:CHECKSUM_BYTES]


def list_digest(names: Names, num_bytes_N: NDArray[np.int64], content: bytes = b"") -> str:
    """Return the sha256 (hex) of the names in order, the byte sizes and `content`, a hash of the images' bytes.

    Folders leave `content` out: reading every file of a large folder to compare it would take hours.
    """
    offsets = np.frombuffer(names.array.buffers()[1], np.int64)[names.array.offset :][: len(names) + 1]
    text = names.array.buffers()[2]
    digest = hashlib.sha256(f"{_FORMAT} {len(names)} ".encode())
    digest.update(np.diff(offsets).astype("<i8").tobytes())
    if text is not None:
        digest.update(memoryview(text)[offsets[0] : offsets[-1]])
    digest.update(num_bytes_N.astype("<i8").tobytes())
    digest.update(content)
    return digest.hexdigest()


def _numpy(column: pa.Array, dtype: type) -> NDArray:
    return column.to_numpy(zero_copy_only=False).astype(dtype)


def _not_an_index(path: str | Path, found: str) -> DatasetError:
    return DatasetError(f"{path} is not a dataset index: found {found}, expected {_FORMAT!r}; index the images again")
