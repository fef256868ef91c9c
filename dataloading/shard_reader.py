"""Reads images out of tar shards by offset and length: from this machine's disk, or from afar through the cache.

Far shards are downloaded ahead by `ShardDownloads`, in the order in which the stream needs them. An image whose shard
is not here yet is read by itself, so nobody waits for a whole shard. What comes from afar is compared with the
manifest's checksums, whole shards piece by piece as they arrive. Reads from this machine's disk are not: SHA-256 would
cost 3 to 4 % of the CPU time of an image, and `instdisc verify` does it when asked.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dataloading.cache import Fetched, ShardCache
from dataloading.index import image_checksum
from dataloading.read_errors import advised
from dataloading.shards import PIECE_BYTES, Shard
from dataloading.storage import Objects

_MAX_OPEN = 256
_OF_KEPT_FILES = (errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Files that are kept open may be what fails: a file server that was restarted, a low limit of open files."""
_PIECES_AT_ONCE = 8
_TRIES = 4
"""Reads of bytes that differ from their checksum: the network may be to blame."""


class CutShortError(OSError):
    """A shard ends before an image that it should hold."""


class ShardBytes(Protocol):
    """Bytes of shards."""

    @property
    def is_remote(self) -> bool:
        """Whether a read may take many milliseconds, so that many should be under way."""
        ...

    def read(self, shard: int, offset: int, length: int, checksum: bytes | None = None) -> bytes:
        """Return bytes of a shard. Raises OSError where they cannot be had.

        checksum: theirs; bytes that come from afar are compared with it: ValueError where they are others.
        """
        ...


@dataclass(frozen=True, eq=False)
class ShardReader:
    """Calling it with a row returns the encoded image. Raises OSError, and ValueError for one that was damaged afar."""

    source: ShardBytes
    shard_N: NDArray[np.int32]
    offset_N: NDArray[np.int64]
    length_N: NDArray[np.int64]
    checksum_N: NDArray[np.void] | None = None
    """As in the manifest; None for tars without one."""

    @property
    def is_remote(self) -> bool:
        return self.source.is_remote

    def __call__(self, row: int) -> bytes:
        checksum = None if self.checksum_N is None else self.checksum_N[row].tobytes()
        return self.source.read(int(self.shard_N[row]), int(self.offset_N[row]), int(self.length_N[row]), checksum)

    def subset(self, rows_R: NDArray[np.int64]) -> ShardReader:
        """Return the reader of some rows, numbered from 0."""
        checksum_R = None if self.checksum_N is None else self.checksum_N[rows_R]
        return ShardReader(self.source, self.shard_N[rows_R], self.offset_N[rows_R], self.length_N[rows_R], checksum_R)


class _Open:
    """A file descriptor that is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalShards:
    """Shards in a folder."""

    is_remote = False

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, tuple(names)
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return LocalShards, (self.folder, self.names)

    def read(self, shard: int, offset: int, length: int, checksum: bytes | None = None) -> bytes:
        """Return bytes of a shard, not compared with their checksum. Raises OSError."""
        path = self.folder / self.names[shard]
        with advised(path):
            try:
                data = os.pread(self._opened(shard).number, length, offset)
            except OSError as error:
                if error.errno not in _OF_KEPT_FILES:
                    raise
                with self._lock:
                    self._open.clear()
                data = os.pread(self._opened(shard).number, length, offset)
        if len(data) < length:
            raise CutShortError(
                f"{path}: found {len(data):,} bytes at {offset:,}, expected {length:,}: it was cut short; copy it again"
            )
        return data

    def _opened(self, shard: int) -> _Open:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = _Open(self.folder / self.names[shard])
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            return file


@dataclass
class Traffic:
    """What was read from the storage."""

    image_bytes: int = 0
    """Of single images whose shard was not here yet."""
    images: int = 0
    shard_bytes: int = 0
    shards: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_image(self, num_bytes: int) -> None:
        with self.lock:
            self.image_bytes, self.images = self.image_bytes + num_bytes, self.images + 1

    def add_shard(self, num_bytes: int) -> None:
        with self.lock:
            self.shard_bytes, self.shards = self.shard_bytes + num_bytes, self.shards + 1


class RemoteShards:
    """Shards of a remote data set: those in the cache are read there, of others only what is asked for."""

    is_remote = True

    def __init__(
        self, objects: Objects, folder: str, shards: Sequence[Shard], cache: ShardCache | None, fingerprint: str
    ) -> None:
        """folder: prefix of the shards' keys. fingerprint: name of the data set in the cache."""
        self.objects, self.folder, self.shards = objects, folder, tuple(shards)
        self.cache, self.fingerprint = cache, fingerprint
        self.traffic = Traffic()

    def __reduce__(self):
        return RemoteShards, (self.objects, self.folder, self.shards, self.cache, self.fingerprint)

    def read(self, shard: int, offset: int, length: int, checksum: bytes | None = None) -> bytes:
        """Return bytes of a shard, from the cache if it is there. Raises OSError, ValueError as `ShardBytes.read`."""
        if self.cache is not None and (descriptor := self.cache.open(self.cache_key(shard))) is not None:
            try:
                data = os.pread(descriptor, length, offset)
            except OSError:
                data = b""  # the disk fails: the storage still has it
            finally:
                os.close(descriptor)
            if len(data) == length:
                return data
            self.cache.remove(self.cache_key(shard))
        key = self.key(shard)
        for _ in range(_TRIES):
            data = self.objects.get(key, offset, offset + length)
            self.traffic.add_image(length)
            if len(data) < length:
                raise CutShortError(
                    f"{self.objects.uri}/{key}: found {len(data):,} bytes at {offset:,}, expected {length:,}: it was "
                    "cut short; put it there again"
                )
            if checksum is None or image_checksum(data) == checksum:
                return data
        raise ValueError(
            f"bytes {offset:,} to {offset + length:,} of {self.objects.uri}/{key} differ from the manifest's checksum "
            f"({_TRIES} tries)"
        )

    def key(self, shard: int) -> str:
        """Return the object's key."""
        return f"{self.folder}{self.shards[shard].name}"

    def cache_key(self, shard: int) -> str:
        """Return the file's key in the cache."""
        return f"{self.fingerprint}/{self.shards[shard].name}"

    def is_here(self, shard: int) -> bool:
        """Whether the shard is in the cache."""
        return self.cache is not None and self.cache.path(self.cache_key(shard)).exists()

    def fetch(self, shard: int, next_use: float) -> Fetched:
        """Have a shard in the cache. Raises OSError where the storage fails or the shard is damaged there."""
        if self.cache is None:
            return Fetched.NO_ROOM
        about = self.shards[shard]

        def download(descriptor: int) -> None:
            self.download(shard, descriptor)
            self.traffic.add_shard(about.num_bytes)

        return self.cache.fetch(self.cache_key(shard), about.num_bytes, download, next_use)

    def download(self, shard: int, descriptor: int) -> None:
        """Write a shard to a file, several pieces at a time, each checked as it arrives."""
        pieces = self.shards[shard].pieces
        with ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="download-pieces") as pool:
            futures = [pool.submit(self._download_piece, shard, number, descriptor) for number in range(len(pieces))]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _download_piece(self, shard: int, number: int, descriptor: int) -> None:
        about, start = self.shards[shard], number * PIECE_BYTES
        stop = min(start + PIECE_BYTES, about.num_bytes)
        for _ in range(_TRIES):
            data = self.objects.get(self.key(shard), start, stop)
            if len(data) == stop - start and image_checksum(data).hex() == about.pieces[number]:
                write_at(descriptor, data, start)
                return
        raise OSError(
            f"{self.objects.uri}/{self.key(shard)}: bytes {start:,} to {stop:,} differ from the manifest's checksum "
            f"({_TRIES} tries); it was changed or damaged there: pack it again, or put it back"
        )


def write_at(descriptor: int, data: bytes, start: int) -> None:
    """Write all of `data` at a place of a file; the system may take it in parts."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], start + written)


def in_pieces(source: ShardBytes, shard: int, num_bytes: int) -> Iterator[bytes]:
    """Yield a whole shard in pieces."""
    for start in range(0, num_bytes, PIECE_BYTES):
        yield source.read(shard, start, min(PIECE_BYTES, num_bytes - start))
