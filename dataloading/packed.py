"""Opens packed images (`dataloading.shards`), on this machine or elsewhere."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataloading.cache import Fetched, ShardCache, writing
from dataloading.headers import BadHeader, Progress, all_small, scan
from dataloading.index import Dataset, DatasetError, DatasetIndex, NoSplit, image_checksum, require_same
from dataloading.labels import first_labelled
from dataloading.layout import WORDS, Part
from dataloading.listing import check_links, contents, existing_root, folders_in
from dataloading.pixel_rules import PixelRules
from dataloading.shard_reader import LocalShards, RemoteShards, ShardReader, in_pieces
from dataloading.shards import MANIFEST, PIECE_BYTES, PLAN, ShardManifest, fingerprint_of, load_manifest
from dataloading.storage import Objects, Storage, is_remote, local_path

_HEAD_BYTES = 64 << 10
_ROWS_AT_ONCE = 64
_MANIFEST_WAIT_S = 600.0
_TRIES = 2

_Shards = LocalShards | RemoteShards


def open_packed(
    root: str | None,
    part: Part,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    storage: Storage | None = None,
    rules: PixelRules | None = None,
) -> Dataset:
    """Return packed images. Arguments and errors as `dataloading.sources.open_dataset`."""
    manifest, source = open_manifest(root, part.split, storage)
    manifest = manifest.chosen(max_rows, part.rule).under(str(root), rules)
    require_same(str(root), index, manifest.index)
    reader = ShardReader(source, manifest.shard_N, manifest.offset_N, manifest.length_N, manifest.checksum_N)
    found = manifest.index
    if not all_small(found.heights_N, found.widths_N, found.bad_N):
        return Dataset(found, None, reader, manifest.layout)
    scanned = scan(
        _in_row_order(manifest, source), found.num_rows, _open_checked, on_progress=on_progress, rules=found.rules
    )
    if scanned.pixels_NHWC is None:
        return Dataset(found, None, reader, manifest.layout)
    marked = replace(found, bad_N=found.bad_N | scanned.bad_N, reasons=scanned.reasons | found.reasons)
    return Dataset(marked, scanned.pixels_NHWC, None, manifest.layout)


def open_manifest(root: str | None, split: str, storage: Storage | None) -> tuple[ShardManifest, _Shards]:
    """Return the manifest of a split and what reads its shards. Raises DatasetError where there is none."""
    if root is not None and is_remote(root):
        return _open_remote(root, split, storage)
    path, part = existing_root(None if root is None else local_path(root), "packed"), Part(split)
    by_lower = {name.lower(): name for name in reversed(folders_in(path)) if (path / name / MANIFEST).is_file()}
    names = [by_lower[name.lower()] for name in packed_names(part) if name.lower() in by_lower]
    if (path / MANIFEST).is_file() and path.name in packed_names(part):
        names.append("")
    if not names:
        require_whole(str(path), (*packed_names(part), ""), lambda key: (path / key).is_file())
        expected = " or ".join(str(path / name / MANIFEST) for name in packed_names(part)[:4])
        raise NoSplit(f"no packed {split} split in {path}: found {contents(path)}; expected {expected}. Pack it")
    return _labelled(names, lambda name: _open_local(path, name))


def _open_local(path: Path, name: str) -> tuple[ShardManifest, _Shards]:
    file = path / name / MANIFEST
    check_links(file.parent, path)
    # Mapped, not read: workers of a machine share its pages.
    manifest = load_manifest(str(file), pa.memory_map(str(file)).read_buffer())
    return manifest, LocalShards(file.parent, [shard.name for shard in manifest.shards])


def _labelled(
    names: Sequence[str], open_one: Callable[[str], tuple[ShardManifest, _Shards]]
) -> tuple[ShardManifest, _Shards]:
    """Return the first of several packed splits that has labels, the first one where none has."""

    def listed(name: str) -> tuple[DatasetIndex, tuple[ShardManifest, _Shards]]:
        manifest, source = open_one(name)
        return manifest.index, (manifest, source)

    index, (manifest, source) = first_labelled(names, listed)
    return replace(manifest, index=index), source


def packed_names(part: Part) -> tuple[str, ...]:
    """Return how the folder of a packed split may be called, the likeliest first."""
    if part.path is not None:
        return (part.path,)
    return tuple(dict.fromkeys((part.split, *(word for kind in part.kinds for word in WORDS[kind]))))


def is_packed(path: Path) -> bool:
    """Whether a local folder holds packed images."""
    return any((path / name / MANIFEST).is_file() for name in folders_in(path))


def require_whole(where: str, folders: Iterable[str], exists: Callable[[str], bool]) -> None:
    """Raise DatasetError where the packing of one of `folders` (relative to `where`) was begun and not ended.

    Its tars alone would be taken for a whole WebDataset. exists(key): whether there is a file, relative to `where`.
    """
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        # The manifest is asked for last: a packing that ends meanwhile writes it before it removes the plan.
        if exists(f"{prefix}{PLAN}") and not exists(f"{prefix}{MANIFEST}"):
            place = where.rstrip("/")
            raise DatasetError(
                f"{place} is not packed to the end ({place}/{prefix}{PLAN}): found no {prefix}{MANIFEST}; give the "
                "instdisc pack command again, or wait for the one that is running"
            )


def _is_object(objects: Objects, key: str) -> bool:
    try:
        objects.size(key)
    except FileNotFoundError:
        return False
    return True


def _open_remote(root: str, split: str, storage: Storage | None) -> tuple[ShardManifest, _Shards]:
    objects = require_storage(root, storage)
    names = [name for name in packed_names(Part(split)) if _is_object(objects, f"{name}/{MANIFEST}")]
    if not names:
        require_whole(root, packed_names(Part(split)), lambda key: _is_object(objects, key))
        expected = " or ".join(f"{root.rstrip('/')}/{name}/{MANIFEST}" for name in packed_names(Part(split))[:4])
        raise NoSplit(f"no packed {split} split in {root}: expected {expected}. Pack the images, or correct the URI")

    def open_one(name: str) -> tuple[ShardManifest, _Shards]:
        assert storage is not None
        key = f"{name}/{MANIFEST}"
        manifest = _load_remote(objects, key, objects.size(key), storage)
        return manifest, RemoteShards(objects, f"{name}/", manifest.shards, storage.cache, manifest.fingerprint)

    return _labelled(names, open_one)


def _load_remote(objects: Objects, key: str, num_bytes: int, storage: Storage) -> ShardManifest:
    """Return a manifest: mapped from the cache where that is possible, else read into memory."""
    where = f"{objects.uri}/{key}"
    if storage.cache is not None:
        head = objects.get(key, 0, min(num_bytes, _HEAD_BYTES))
        name = f"manifests/{fingerprint_of(head, str(num_bytes).encode(), where.encode())}.arrow"
        for _ in range(_TRIES):
            kept = _kept_manifest(objects, key, num_bytes, storage.cache, name)
            if kept is None:
                break
            try:
                return load_manifest(where, kept)
            except DatasetError:
                # The copy may have lost bytes; whether the storage's is a whole one, the storage's bytes tell.
                storage.cache.remove(name)
    return load_manifest(where, pa.py_buffer(objects.get(key)))


def _kept_manifest(objects: Objects, key: str, num_bytes: int, cache: ShardCache, name: str) -> pa.Buffer | None:
    """Return a manifest's bytes, mapped from the cache, where they are downloaded to first; None where it fails."""

    def download(descriptor: int) -> None:
        with writing(descriptor) as writer:
            for start in range(0, num_bytes, PIECE_BYTES):
                writer.write(objects.get(key, start, min(num_bytes, start + PIECE_BYTES)), start)

    deadline = time.monotonic() + _MANIFEST_WAIT_S
    while (fetched := cache.fetch(name, num_bytes, download, time.time() + 60)) is Fetched.BUSY:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if fetched is not Fetched.THERE:
        return None
    try:
        return pa.memory_map(str(cache.path(name))).read_buffer()
    except OSError:
        return None  # removed again by another job


def require_storage(root: str, storage: Storage | None) -> Objects:
    """Return the objects below a remote root. Raises DatasetError where nobody handed in how to reach it."""
    if storage is None:
        raise DatasetError(f"data root {root}: found a remote place, but no storage to reach it with; name a folder")
    return storage.open(root)


def _open_checked(image: tuple[bytes, bytes]) -> io.BytesIO:
    encoded, checksum = image
    if image_checksum(encoded) != checksum:
        raise BadHeader("its bytes differ from the manifest's checksum")
    return io.BytesIO(encoded)


def _in_row_order(manifest: ShardManifest, source: _Shards) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield all images with their checksums in row order, each shard being read once from end to end."""
    starts_S = np.cumsum([0, *(shard.num_bytes for shard in manifest.shards)]).tolist()
    rows = range(manifest.index.num_rows)
    # The encoded bytes of images that are kept in memory decoded fit on a disk for a moment.
    with tempfile.TemporaryFile() as file:
        for number, shard in enumerate(manifest.shards):
            if shard.num_rows:
                file.seek(starts_S[number])
                for piece in in_pieces(source, number, shard.num_bytes, shard.pieces):
                    file.write(piece)
        file.flush()
        for first in rows[::_ROWS_AT_ONCE]:
            yield [
                (
                    os.pread(
                        file.fileno(),
                        int(manifest.length_N[row]),
                        starts_S[manifest.shard_N[row]] + int(manifest.offset_N[row]),
                    ),
                    manifest.checksum_N[row].tobytes(),
                )
                for row in rows[first : first + _ROWS_AT_ONCE]
            ]
