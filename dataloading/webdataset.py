"""Images in tar files as WebDataset writes them: ROOT/<split>-000000.tar, ROOT/<split>/….tar, or the only tars there.

A sample is the members of a tar that share a name up to the first dot of their last part; its image is the member with
an image's ending, its label the whole number in the member `cls`. A row's name is the tar and the member; rows are in
the order of tars and members. Other members are ignored, but a sample with a second image is refused: which of them is
meant is not known.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import (
    MAX_CLASSES,
    Dataset,
    DatasetError,
    DatasetIndex,
    Names,
    NoSplit,
    list_digest,
    require_same,
)
from dataloading.listing import SPLIT_NAMES, contents, existing_root, is_listed, list_files
from dataloading.numerals import whole_number
from dataloading.packed import require_storage, require_whole
from dataloading.pixel_rules import PixelRules
from dataloading.scanned import holds, scan_dataset
from dataloading.shard_reader import LocalShards, RemoteShards, ShardReader, in_pieces
from dataloading.shards import Shard, fingerprint_of
from dataloading.storage import Storage, is_remote, local_path
from dataloading.tars import TAR_ERRORS, members_of, open_tar

_CHUNK = 64
_MAX_LABEL_BYTES = 32
_MAX_END_BYTES = 1 << 20  # of zeros after the last member; programs write 1 to 10 kB


@dataclass(frozen=True)
class _Member:
    name: str
    shard: int
    offset: int
    length: int
    label: int | None


def open_webdataset(
    root: str | None,
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
    storage: Storage | None = None,
) -> Dataset:
    """Return the images of WebDataset tars. Arguments and errors as `dataloading.sources.open_dataset`."""
    listed, read = list_webdataset(root, split, max_rows=max_rows, storage=storage)
    require_same(str(root), index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index, None, read)
    rows = range(listed.num_rows)
    chunks = (list(rows[first : first + _CHUNK]) for first in rows[::_CHUNK])
    return scan_dataset(
        listed, read, chunks, lambda row: io.BytesIO(read(row)), where=str(root), on_progress=on_progress, rules=rules
    )


def list_webdataset(
    root: str | None, split: str, *, max_rows: int | None = None, storage: Storage | None = None
) -> tuple[DatasetIndex, ShardReader]:
    """Return the images of tars as far as the tars' headers tell. Remote tars are read once from end to end."""
    where = str(root)
    if root is not None and is_remote(root):
        objects = require_storage(root, storage)
        sizes = dict(objects.list_sizes())
        names = tars_of_split((key for key in sizes if is_listed(key, {".tar"})), split)
        require_whole(where, _folders(names, split), sizes.__contains__)
        shards = [Shard(name, sizes[name], 0, ()) for name in names]
        fingerprint = fingerprint_of(objects.uri.encode(), repr([(s.name, s.num_bytes) for s in shards]).encode())
        source = RemoteShards(objects, "", shards, None, fingerprint)
        found_here = ", ".join(list(sizes)[:8]) or "nothing"
    else:
        path = existing_root(None if root is None else local_path(root), "webdataset")
        names = tars_of_split((name for name, _ in list_files(path, path, {".tar"})), split)
        require_whole(str(path), _folders(names, split), lambda key: (path / key).is_file())
        shards = [Shard(name, (path / name).stat().st_size, 0, ()) for name in names]
        source = LocalShards(path, names)
        found_here = contents(path)
    if not names:
        raise NoSplit(
            f"no {split} tars in {where}: found {found_here}; expected "
            f"{' or '.join(f'{name}-*.tar' for name in SPLIT_NAMES[split])}, there or in a folder of that name"
        )
    members: list[_Member] = []
    for number, shard in enumerate(shards):
        for member in _members(f"{where.rstrip('/')}/{shard.name}", source, number, shard):
            members.append(member)
            if len(members) == max_rows:
                break
        if len(members) == max_rows:
            break
    if not members:
        raise DatasetError(f"no images in the {len(names)} tars of {where}: expected members with an image's ending")
    return _index(f"webdataset {where} ({split})", members), _reader(source, members)


def tars_of_split(names: Iterable[str], split: str) -> list[str]:
    """Return the tars of a split, sorted: named by it or in a folder of its name; all of them if none is so named."""
    tars = sorted(names)

    def is_of(name: str, split_name: str) -> bool:
        path = PurePosixPath(name)
        return path.stem == split_name or path.name.startswith(f"{split_name}-") or path.parent.name == split_name

    for split_name in SPLIT_NAMES[split]:
        if mine := [name for name in tars if is_of(name, split_name)]:
            return mine
    named = any(is_of(name, other) for name in tars for others in SPLIT_NAMES.values() for other in others)
    return tars if split == "train" and not named else []


def _folders(tars: list[str], split: str) -> list[str]:
    """Return the folders that tars of a split are in or would be in."""
    parents = (name.rpartition("/")[0] for name in tars)
    return list(dict.fromkeys((*parents, *SPLIT_NAMES[split])))


def _reader(source: LocalShards | RemoteShards, members: list[_Member]) -> ShardReader:
    return ShardReader(
        source,
        np.array([m.shard for m in members], dtype=np.int32),
        np.array([m.offset for m in members], dtype=np.int64),
        np.array([m.length for m in members], dtype=np.int64),
    )


def _index(source: str, members: list[_Member]) -> DatasetIndex:
    names = Names.of(member.name for member in members)
    num_bytes_N = np.array([member.length for member in members], dtype=np.int64)
    labels = [member.label for member in members]
    labelled = all(label is not None and label >= 0 for label in labels)
    labels_N = np.array(labels, dtype=np.int64) if labelled else None
    return DatasetIndex(
        source=source,
        names=names,
        heights_N=np.zeros(len(members), dtype=np.int32),
        widths_N=np.zeros(len(members), dtype=np.int32),
        labels_N=labels_N,
        class_names=() if labels_N is None else tuple(str(label) for label in range(int(labels_N.max()) + 1)),
        bad_N=np.zeros(len(members), dtype=np.bool_),
        digest=list_digest(names, num_bytes_N),
        num_bytes_N=num_bytes_N,
    )


def _members(where: str, source: LocalShards | RemoteShards, number: int, shard: Shard) -> Iterator[_Member]:
    """Yield the images of a tar. Raises DatasetError where it is damaged."""
    key, image, label = None, None, None
    try:
        with _open_tar(source, number, shard) as tar:
            for member in members_of(tar, shard.num_bytes):
                if not member.isfile():
                    continue
                folder, _, last = member.name.rpartition("/")
                stem, _, ending = last.partition(".")
                if (folder, stem) != key:
                    if image is not None:
                        yield replace(image, label=label)
                    key, image, label = (folder, stem), None, None
                if "." + ending.rpartition(".")[2].lower() in EXTENSIONS:
                    if image is not None:
                        raise _two_images(where, image.name, f"{shard.name}/{member.name}")
                    image = _Member(f"{shard.name}/{member.name}", number, member.offset_data, member.size, None)
                elif ending == "cls" and member.size <= _MAX_LABEL_BYTES:
                    label = _label(f"{where}/{member.name}", tar.extractfile(member))
            if image is not None:
                yield replace(image, label=label)
            _check_end(source, number, shard, tar.offset)
    except DatasetError:
        raise
    except TAR_ERRORS as error:
        raise DatasetError(f"{where} is not a whole tar file ({error}); fetch or write it again") from error


def _two_images(where: str, first: str, second: str) -> DatasetError:
    return DatasetError(
        f"{where}: found two images in one sample, {first!r} and {second!r}: in WebDataset what agrees up to the first "
        "dot of the last part is one sample; expected one image in each. Write the images under names of their own, "
        "or unpack the tars into a folder and pack that"
    )


def _open_tar(source: LocalShards | RemoteShards, number: int, shard: Shard) -> tarfile.TarFile:
    if isinstance(source, LocalShards):
        return open_tar(shard.num_bytes, path=source.folder / shard.name)
    pieces = _Stream(in_pieces(source, number, shard.num_bytes))
    return open_tar(shard.num_bytes, file=pieces, mode="r|")  # pyright: ignore[reportArgumentType]


def _check_end(source: LocalShards | RemoteShards, number: int, shard: Shard, end: int) -> None:
    """Raise ReadError where a tar does not end where its last header was found: tarfile stops at damage in silence."""
    left = shard.num_bytes - end
    if left > _MAX_END_BYTES or source.read(number, end, left).strip(b"\0"):
        raise tarfile.ReadError(f"no header of a member at byte {end:,}, where {left:,} bytes are left")


def _label(where: str, file) -> int | None:
    try:
        label = whole_number(file.read())
    except (AttributeError, ValueError):
        return None
    if label >= MAX_CLASSES:
        raise DatasetError(f"{where}: found label {label}, expected below {MAX_CLASSES:,}. Correct or remove it")
    return label


class _Stream(io.RawIOBase):
    """Pieces as one file that is read from its beginning to its end."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
