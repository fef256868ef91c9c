"""Loose images in a bucket or under any other URI, one object each, in the layouts of `dataloading.folder`.

Every object costs a request per read: for more than some ten thousand images, pack them.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dataloading import notes
from dataloading.folder import chosen_files, file_index
from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, Names, require_same
from dataloading.labels import apart, first_labelled
from dataloading.layout import Part
from dataloading.listing import list_keys
from dataloading.packed import require_storage
from dataloading.pixel_rules import PixelRules
from dataloading.scanned import holds, scan_dataset
from dataloading.split_folders import FolderChoice, NamedTree, choose_folder
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
    part: Part,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
    storage: Storage | None = None,
) -> Dataset:
    """Return loose images. Arguments and errors as `dataloading.sources.open_dataset`."""
    listed, read = list_objects(root, part, max_rows=max_rows, storage=storage)
    require_same(root, index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index.with_notes(listed.notes), None, read)
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
    root: str, part: Part, *, max_rows: int | None = None, storage: Storage | None = None
) -> tuple[DatasetIndex, ObjectsReader]:
    """Return loose images as far as the list of objects tells: their sizes in pixels are not looked at."""
    objects = require_storage(root, storage)
    sizes = objects.list_sizes()
    everything = list_keys(sizes, EXTENSIONS, Counter())
    if not everything:
        counts: Counter[str] = Counter()
        list_keys(sizes, EXTENSIONS, counts)
        found = " and ".join(note.text for note in notes.left_out(counts, "objects")) or "nothing"
        raise DatasetError(
            f"no images in {root}: found {found}; expected objects that end in {', '.join(sorted(EXTENSIONS))}. "
            "Correct the URI"
        )
    tree = NamedTree({key.rpartition("/")[0] for key, _ in everything})
    choices = choose_folder(tree, part, where=root)
    source = f"objects {root} ({part.split})"
    index, prefix = first_labelled(choices, lambda choice: _listing(source, tree, sizes, choice, max_rows, part.rule))
    assert index.num_bytes_N is not None
    return index, ObjectsReader(objects, prefix, Names.of(index.names), index.num_bytes_N)


def _listing(
    source: str, tree: NamedTree, sizes: list[tuple[str, int]], choice: FolderChoice, max_rows: int | None, rule: int
) -> tuple[DatasetIndex, str]:
    left_out: Counter[str] = Counter()
    prefix = f"{choice.base}/" if choice.base else ""
    below = [(key.removeprefix(prefix), size) for key, size in sizes if key.startswith(prefix)]
    files = list_keys(below, EXTENSIONS, left_out)
    own = {name.partition("/")[0] for name, _ in files if "/" in name}
    others = {folder for other in choice.others for folder in tree.folders(other)}
    loose = [key for key, _ in list_keys(sizes, EXTENSIONS, Counter()) if "/" not in key] if prefix else []
    told = (
        *choice.notes,
        *notes.loose(loose),
        *notes.left_out(left_out, "objects"),
        *apart(own, others),
    )
    files, told = chosen_files(sorted(files), max_rows, rule, told)
    return file_index(source, files, sorted(own | others), choice.is_literal, told), prefix


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
