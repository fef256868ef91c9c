"""Loose images in a bucket or under any other URI, one object each, in the layouts of `dataloading.folder`.

Every object costs a request per read: for more than some ten thousand images, pack them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dataloading.folder import choose_split, file_index
from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, Names, NoSplit, require_same
from dataloading.listing import SPLIT_NAMES, is_listed
from dataloading.packed import require_storage
from dataloading.pixel_rules import PixelRules
from dataloading.scanned import holds, scan_dataset
from dataloading.storage import Objects, Storage

_HEADER_BYTES = 64 << 10
_CHUNK = 8
_SCAN_THREADS = 32


@dataclass(frozen=True, eq=False)
class ObjectsReader:
    """Reads a row's object."""

    objects: Objects
    prefix: str
    names: Names
    num_bytes_N: NDArray[np.int64]
    is_remote = True

    def __call__(self, row: int) -> bytes:
        # With its end named, a read is one request; without, most clients ask for the size first.
        return self.objects.get(self.prefix + self.names[row], 0, int(self.num_bytes_N[row]))

    def subset(self, rows_R: NDArray[np.int64]) -> ObjectsReader:
        """Return the reader of some rows, numbered from 0."""
        names = Names.of(self.names[row] for row in rows_R.tolist())
        return ObjectsReader(self.objects, self.prefix, names, self.num_bytes_N[rows_R])


def open_objects(
    root: str,
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
    storage: Storage | None = None,
) -> Dataset:
    """Return loose images. Arguments and errors as `dataloading.sources.open_dataset`."""
    listed, read = list_objects(root, split, max_rows=max_rows, storage=storage)
    require_same(root, index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index, None, read)
    rows = range(listed.num_rows)
    chunks = (list(rows[first : first + _CHUNK]) for first in rows[::_CHUNK])
    return scan_dataset(
        listed,
        read,
        chunks,
        lambda row: _open(read, row),
        where=root,
        on_progress=on_progress,
        num_threads=_SCAN_THREADS,
        rules=rules,
    )


def list_objects(
    root: str, split: str, *, max_rows: int | None = None, storage: Storage | None = None
) -> tuple[DatasetIndex, ObjectsReader]:
    """Return loose images as far as the list of objects tells: their sizes in pixels are not looked at."""
    objects = require_storage(root, storage)
    everything = [(key, size) for key, size in objects.list_sizes() if is_listed(key, EXTENSIONS)]
    here = sorted({key.split("/", 1)[0] for key, _ in everything if "/" in key})
    direct = {key.split("/", 1)[0] for key, _ in everything if key.count("/") == 1}
    found = choose_split(here, split, direct.__contains__)
    if found is None:
        expected = " or ".join(f"{root.rstrip('/')}/{name}/" for name in SPLIT_NAMES[split])
        raise NoSplit(f"no {split} split in {root}: found {_some(here)}; expected images below {expected}")
    name, splits = found
    prefix = f"{name}/" if name else ""
    files = [(key.removeprefix(prefix), size) for key, size in everything if key.startswith(prefix)]
    if not files:
        raise DatasetError(
            f"no images in {root}: expected objects that end in {', '.join(sorted(EXTENSIONS))}. Correct the URI"
        )
    classes = here
    if name:
        classes = sorted(
            {key.split("/", 2)[1] for key, _ in everything if key.split("/", 1)[0] in splits and key.count("/") > 1}
        )
    index = file_index(f"objects {root} ({split})", sorted(files)[:max_rows], classes)
    assert index.num_bytes_N is not None
    return index, ObjectsReader(objects, prefix, Names.of(index.names), index.num_bytes_N)


def _some(names: list[str]) -> str:
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "no folders"


def _open(read: ObjectsReader, row: int) -> BinaryIO:
    return io.BufferedReader(_Ranges(read, row), _HEADER_BYTES)  # pyright: ignore[reportReturnType]


class _Ranges(io.RawIOBase):
    """An object as a file of which only the parts that are looked at are read."""

    def __init__(self, read: ObjectsReader, row: int) -> None:
        super().__init__()
        self._objects, self._key = read.objects, read.prefix + read.names[row]
        self._size, self._place = int(read.num_bytes_N[row]), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer) -> int:
        stop = min(self._size, self._place + len(buffer))
        if stop <= self._place:
            return 0
        data = self._objects.get(self._key, self._place, stop)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
