"""Images in tar files as WebDataset writes them: ROOT/<split>-000000.tar, ROOT/<split>/….tar, or the only tars there.

A sample is the members of a tar that share a name up to the first dot of their last part; its image is the member with
an image's ending, its label what the member that ends in `.cls` says: a whole number, or the name of a class. A row's
name is the tar and the member; rows are in the order of tars and members. Other members are left out and counted, but a
sample with a second image is refused: which of them is meant is not known.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from dataloading import notes
from dataloading.headers import Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, Names, list_digest, require_same
from dataloading.io_threads import IoThreads
from dataloading.kept_indexes import KeptIndex
from dataloading.labels import first_labelled
from dataloading.layout import KIND_OF_WORD, Part
from dataloading.listing import existing_root, list_files, list_keys
from dataloading.notes import TAKEN, Note
from dataloading.packed import require_storage, require_whole
from dataloading.pixel_rules import PixelRules
from dataloading.row_choice import FIRST_ROWS_RULE, choice_notes, chosen_rows
from dataloading.scanned import holds, scan_dataset
from dataloading.shard_reader import LocalShards, RemoteShards, ShardReader, in_pieces
from dataloading.shards import Shard, fingerprint_of
from dataloading.split_files import FilesChoice, choose_files
from dataloading.storage import Storage, is_remote, local_path
from dataloading.tar_samples import Image, Samples
from dataloading.tars import TAR_ERRORS, members_of, open_tar

_CHUNK = 64
_HEADERS_AT_ONCE = 32
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")  # gzip, xz, bzip2, zstandard
_MAX_END_BYTES = 1 << 20  # of zeros after the last member; programs write 1 to 10 kB


def open_webdataset(
    root: str | None,
    part: Part,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
    storage: Storage | None = None,
) -> Dataset:
    """Return the images of WebDataset tars. Arguments and errors as `dataloading.sources.open_dataset`."""
    keeper = _keeper(root, part, max_rows, rules, storage) if index is None else None
    kept = None if keeper is None else keeper.load()
    listed, read = list_webdataset(root, part, max_rows=max_rows, index=index or kept, storage=storage)
    require_same(str(root), index, listed)
    if kept is not None and (listed.files, listed.versions) == (kept.files, kept.versions):
        index = kept
    if index is not None and holds(index, rules):
        places = {name: getattr(listed, name) for name in ("num_bytes_N", "files", "versions", "offsets_N")}
        return Dataset(replace(index, notes=listed.notes, **places), None, read)
    rows = range(listed.num_rows)
    chunks = (list(rows[first : first + _CHUNK]) for first in rows[::_CHUNK])
    found = scan_dataset(
        listed, read, chunks, lambda row: io.BytesIO(read(row)), where=str(root), on_progress=on_progress, rules=rules
    )
    if keeper is not None and index is None:
        keeper.save(found.index)
    return found


def _keeper(
    root: str | None, part: Part, max_rows: int | None, rules: PixelRules | None, storage: Storage | None
) -> KeptIndex | None:
    if storage is None or storage.cache is None or root is None or not is_remote(root):
        return None
    return KeptIndex(storage.cache, root.rstrip("/"), part, max_rows, rules)


def list_webdataset(
    root: str | None,
    part: Part,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    storage: Storage | None = None,
) -> tuple[DatasetIndex, ShardReader]:
    """Return the images of tars as far as the tars' headers tell.

    Remote tars are read from end to end, unless a saved index of the same question knows their members: while the tars
    are those that it says, none is read.
    """
    where, left_out = str(root), Counter[str]()
    if root is not None and is_remote(root):
        objects = require_storage(root, storage)
        versions = objects.versions()  # first: of a tar that is replaced meanwhile, the older one
        sizes = dict(objects.list_sizes())
        tars = list_keys(list(sizes.items()), {".tar"}, left_out)
        require_whole(where, _folders(tars), sizes.__contains__)

        def source_of(shards: list[Shard]) -> LocalShards | RemoteShards:
            fingerprint = fingerprint_of(objects.uri.encode(), repr([(s.name, s.num_bytes) for s in shards]).encode())
            return RemoteShards(objects, "", shards, None, fingerprint)
    else:
        path = existing_root(None if root is None else local_path(root), "webdataset")
        tars = list_files(path, path, {".tar"}, left_out=left_out)
        require_whole(str(path), _folders(tars), lambda key: (path / key).is_file())
        versions = {key: str((path / key).stat().st_mtime_ns) for key, _ in tars}

        def source_of(shards: list[Shard]) -> LocalShards | RemoteShards:
            return LocalShards(path, [shard.name for shard in shards])

    size_of = dict(tars)

    def list_one(choice: FilesChoice) -> tuple[DatasetIndex, ShardReader]:
        shards = [Shard(name, size_of[name], 0, ()) for name in choice.names]
        source = source_of(shards)
        spread = part.rule != FIRST_ROWS_RULE
        # The first rows need the first tars alone.
        samples = _samples(where, source, shards, None if spread else max_rows, keep_hidden=part.rule == 1)
        found = samples.images
        samples.images = [found[row] for row in chosen_rows(len(found), max_rows, spread=spread).tolist()]
        chosen = choice_notes(len(found), len(samples.images), spread=spread)
        told = (
            *choice.notes,
            *chosen,
            *notes.left_out(left_out),
            *notes.left_out(samples.left_out, "members of the tars"),
        )
        listed = _index(f"webdataset {where} ({part.split})", samples, shards, versions)
        return replace(listed, notes=(*told, *listed.notes)), _reader(source, samples.images)

    choices = choose_files(list(size_of), part, where=where, what="tars")
    for choice in choices if index is not None else ():
        shards = [Shard(name, size_of[name], 0, ()) for name in choice.names]
        members = None if index is None else _saved_members(index, shards)
        if index is None or members is None:
            continue
        if _are_same(index, source := source_of(shards), members, versions):
            found = {name: versions[name] for name in index.files if name in versions}
            return replace(index, versions=found), _reader(source, members)
    return first_labelled(choices, list_one)


def _samples(
    where: str, source: LocalShards | RemoteShards, shards: list[Shard], max_rows: int | None, *, keep_hidden: bool
) -> Samples:
    samples = Samples(keep_hidden)
    for number, shard in enumerate(shards):
        _add_tar(f"{where.rstrip('/')}/{shard.name}", source, number, shard, samples)
        if max_rows is not None and len(samples.images) >= max_rows:
            del samples.images[max_rows:]
            break
    if not samples.images:
        found = " and ".join(note.text for note in notes.left_out(samples.left_out, "members")) or "no members"
        tars = f"the {len(shards):,} tars of {where}" if len(shards) > 1 else f"{shards[0].name} in {where}"
        inner = ". Unpack the tars in it" if samples.left_out.get(".tar") else ""
        raise DatasetError(f"no images in {tars}: found {found}; expected members with an image's ending{inner}")
    return samples


def _folders(tars: Sequence[tuple[str, int]]) -> list[str]:
    """Return the folders that tars are in, or would be in."""
    parents = {name.rpartition("/")[0] for name, _ in tars}
    return sorted(parents | {"", *KIND_OF_WORD})


def _reader(source: LocalShards | RemoteShards, members: list[Image]) -> ShardReader:
    return ShardReader(
        source,
        np.array([m.shard for m in members], dtype=np.int32),
        np.array([m.offset for m in members], dtype=np.int64),
        np.array([m.length for m in members], dtype=np.int64),
    )


def _saved_members(index: DatasetIndex, shards: Sequence[Shard]) -> list[Image] | None:
    """Return the images of a saved index; None where it does not know their places, or where the tars are others."""
    offsets_N, lengths_N = index.offsets_N, index.num_bytes_N
    if offsets_N is None or lengths_N is None or index.files != {shard.name: shard.num_bytes for shard in shards}:
        return None
    members, number = [], 0
    for name, offset, length in zip(index.names, offsets_N.tolist(), lengths_N.tolist(), strict=True):
        while number < len(shards) and not name.startswith(f"{shards[number].name}/"):
            number += 1
        if number == len(shards) or not 0 <= offset <= shards[number].num_bytes - length:
            return None
        members.append(Image(name, number, offset, length))
    return members


def _are_same(
    index: DatasetIndex, source: LocalShards | RemoteShards, members: Sequence[Image], versions: dict[str, str]
) -> bool:
    """Whether tars of the names and sizes of a saved index are those that it was made of.

    Where their versions are not known, each has to have the header of its last image where that was.
    """
    if index.files.keys() <= index.versions.keys() & versions.keys():
        return all(index.versions[name] == versions[name] for name in index.files)
    with closing(IoThreads(_HEADERS_AT_ONCE, "look-at-tars")) as threads:
        last = {member.shard: member for member in members}
        found = [threads.submit(_has_header, source, member) for member in last.values()]
        return all(future.result() for future in found)


def _has_header(source: LocalShards | RemoteShards, member: Image) -> bool:
    start = member.offset - tarfile.BLOCKSIZE
    try:
        header = source.read(member.shard, start, tarfile.BLOCKSIZE) if start >= 0 else b""
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == member.length
    except tarfile.HeaderError:
        return False


def _index(source: str, samples: Samples, shards: Sequence[Shard], versions: dict[str, str]) -> DatasetIndex:
    images, labels = samples.images, samples.labels()
    names = Names.of(image.name for image in images)
    num_bytes_N = np.array([image.length for image in images], dtype=np.int64)
    return DatasetIndex(
        source=source,
        names=names,
        heights_N=np.zeros(len(images), dtype=np.int32),
        widths_N=np.zeros(len(images), dtype=np.int32),
        labels_N=labels.labels_N,
        class_names=labels.class_names,
        bad_N=np.zeros(len(images), dtype=np.bool_),
        digest=list_digest(names, num_bytes_N),
        num_bytes_N=num_bytes_N,
        files={shard.name: shard.num_bytes for shard in shards},
        versions={shard.name: versions[shard.name] for shard in shards if shard.name in versions},
        offsets_N=np.array([image.offset for image in images], dtype=np.int64),
        notes=(*_twice(samples.images), *labels.notes),
    )


def _twice(images: Sequence[Image]) -> tuple[Note, ...]:
    """Return the note on members that have the name of an earlier one in their tar, as `tar --append` leaves them."""
    names = Counter(image.name for image in images)
    if not (num := len(images) - len(names)):
        return ()
    (name, times), *_ = names.most_common(1)
    have = "images have" if num > 1 else "image has"
    text = f"{num:,} {have} the name of another in the same tar ({name}, {times:,} times); all are used"
    return (Note(TAKEN, text, num),)


def _add_tar(where: str, source: LocalShards | RemoteShards, number: int, shard: Shard, samples: Samples) -> None:
    """Add the images of a tar. Raises DatasetError where it is damaged."""
    members = samples.add_tar(where, shard.name, number)
    try:
        with _open_tar(source, number, shard) as tar:
            for member in members_of(tar, shard.num_bytes):
                if member.isfile():
                    members.add(member.name, member.offset_data, member.size, lambda m=member: _content(tar, m))
                elif member.issym() or member.islnk():
                    members.add_link(member.name)
            _check_end(source, number, shard, tar.offset)
    except DatasetError:
        raise
    except TAR_ERRORS as error:
        if source.read(number, 0, min(6, shard.num_bytes)).startswith(_COMPRESSED):
            raise DatasetError(
                f"{where} is compressed, and images are read at their places in tars as they are; unpack it (gunzip, "
                "xz -d, bzip2 -d, zstd -d)"
            ) from error
        raise DatasetError(f"{where} is not a whole tar file ({error}); fetch or write it again") from error
    members.end()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


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
