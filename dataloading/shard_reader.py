"""Reads images out of tar shards by offset and length: from this machine's disk, or from afar through the cache.

Far shards are downloaded ahead by `ShardDownloads`, in the order in which the stream needs them. An image whose shard
is not here yet is read by itself, so nobody waits for a whole shard. What comes from afar is compared with the
manifest's checksums, whole shards piece by piece as they arrive. Reads from this machine's disk are not: SHA-256 would
cost 3 to 4 % of the CPU time of an image, and `instdisc verify` does it when asked.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dataloading.cache import CacheWriter, Fetched, ShardCache, writing
from dataloading.index import image_checksum
from dataloading.io_threads import IoThreads
from dataloading.read_errors import advised
from dataloading.shards import PIECE_BYTES, Shard
from dataloading.storage import Objects

_LOG = logging.getLogger("instdisc.cache")
_MAX_OPEN = 256
_OF_KEPT_FILES = (errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Files that are kept open may be what fails: a file server that was restarted, a low limit of open files."""
_PIECES_AT_ONCE = 8
_TRIES = 4
"""Reads of bytes that differ from their checksum: the network may be to blame."""
_MAX_LOSSES = 2
"""A shard whose copy here turned out wrong so often is not kept any more: the disk is to blame."""
_TICK_S = 0.1


class DownloadStopped(Exception):
    """Nobody wants a shard any more that was on its way."""


class CutShortError(OSError):
    """A shard ends before an image that it should hold."""


class ShardBytes(Protocol):
    """Bytes of shards."""

    @property
    def is_remote(self) -> bool:
        """Whether a read may take many milliseconds, so that many should be under way."""
        ...

    def read(
        self, shard: int, offset: int, length: int, checksum: bytes | None = None, *, compare: bool = False
    ) -> bytes:
        """Return bytes of a shard. Raises OSError where they cannot be had.

        checksum: theirs; bytes that come from afar are compared with it: ValueError where they are others. compare:
        those of this machine's disk too; a copy that the cache keeps gives way to the storage.
        """
        ...

    def num_bytes(self, shard: int) -> int:
        """Return the bytes that a shard has where it lies. Raises OSError."""
        ...

    def other_tars(self) -> list[str]:
        """Return the names of tars beside the shards that are none of them, sorted. Raises OSError."""
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
    compares: bool = False
    """Compare what this machine's disk gives as well: for whoever writes the images somewhere else."""

    @property
    def is_remote(self) -> bool:
        return self.source.is_remote

    def __call__(self, row: int) -> bytes:
        return self._read(row, compare=self.compares)

    def repaired(self, row: int, encoded: bytes) -> bytes | None:
        """Return a row's image where `encoded`, which was read for it, is another; None where it is not, or unknown.

        Raises as a call, ValueError too where this machine has no better copy.
        """
        checksum = self._checksum(row)
        if checksum is None or image_checksum(encoded) == checksum:
            return None
        return self._read(row, compare=True)

    def _read(self, row: int, *, compare: bool) -> bytes:
        shard, offset, length = int(self.shard_N[row]), int(self.offset_N[row]), int(self.length_N[row])
        return self.source.read(shard, offset, length, self._checksum(row), compare=compare)

    def _checksum(self, row: int) -> bytes | None:
        return None if self.checksum_N is None else self.checksum_N[row].tobytes()

    def subset(self, rows_R: NDArray[np.int64]) -> ShardReader:
        """Return the reader of some rows, numbered from 0."""
        checksum_R = None if self.checksum_N is None else self.checksum_N[rows_R]
        return replace(
            self,
            shard_N=self.shard_N[rows_R],
            offset_N=self.offset_N[rows_R],
            length_N=self.length_N[rows_R],
            checksum_N=checksum_R,
        )


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

    def read(
        self, shard: int, offset: int, length: int, checksum: bytes | None = None, *, compare: bool = False
    ) -> bytes:
        """Return bytes of a shard. Raises as `ShardBytes.read`."""
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
        if compare and checksum is not None and image_checksum(data) != checksum:
            raise ValueError(f"bytes {offset:,} to {offset + length:,} of {path} differ from the manifest's checksum")
        return data

    def num_bytes(self, shard: int) -> int:
        """Return the bytes that a shard has on the disk. Raises OSError."""
        return (self.folder / self.names[shard]).stat().st_size

    def other_tars(self) -> list[str]:
        """Return the names of tars in the folder that are no shards, sorted."""
        return sorted({path.name for path in self.folder.glob("*.tar")} - set(self.names))

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
        self.num_lost = 0
        """How often a copy in the cache turned out wrong."""
        self._losses: Counter[int] = Counter()

    def __reduce__(self):
        return RemoteShards, (self.objects, self.folder, self.shards, self.cache, self.fingerprint)

    def read(
        self, shard: int, offset: int, length: int, checksum: bytes | None = None, *, compare: bool = False
    ) -> bytes:
        """Return bytes of a shard, from the cache if it is there. Raises OSError, ValueError as `ShardBytes.read`."""
        kept = self._kept(shard, offset, length)
        if kept is not None:
            is_whole = len(kept) == length
            if is_whole and not (compare and checksum is not None and image_checksum(kept) != checksum):
                return kept
            self._lose(shard)
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

    def _kept(self, shard: int, offset: int, length: int) -> bytes | None:
        """Return what the cache has of some bytes, None where it has no copy of the shard."""
        if self.cache is None or (descriptor := self.cache.open(self.cache_key(shard))) is None:
            return None
        try:
            return os.pread(descriptor, length, offset)
        except OSError:
            return b""  # the disk fails: the storage still has it
        finally:
            os.close(descriptor)

    def _lose(self, shard: int) -> None:
        """Take a copy out of the cache that is not what the storage holds."""
        assert self.cache is not None
        self.cache.remove(self.cache_key(shard))
        self._losses[shard] += 1
        self.num_lost += 1
        _LOG.warning(
            "%s is not what %s holds: it is removed, and read from there again",
            self.cache.path(self.cache_key(shard)),
            f"{self.objects.uri}/{self.key(shard)}",
        )

    def num_bytes(self, shard: int) -> int:
        """Return the bytes that a shard has in the storage. Raises OSError."""
        return self.objects.size(self.key(shard))

    def other_tars(self) -> list[str]:
        """Return the names of tars beside the shards that are none of them, sorted. Raises OSError."""
        found = {key.removeprefix(self.folder) for key, _ in self.objects.list_sizes(self.folder)}
        return sorted({name for name in found if name.endswith(".tar")} - {shard.name for shard in self.shards})

    def key(self, shard: int) -> str:
        """Return the object's key."""
        return f"{self.folder}{self.shards[shard].name}"

    def cache_key(self, shard: int) -> str:
        """Return the file's key in the cache."""
        return f"{self.fingerprint}/{self.shards[shard].name}"

    def is_here(self, shard: int) -> bool:
        """Whether the shard is in the cache."""
        return self.cache is not None and os.path.exists(self.cache.path(self.cache_key(shard)))

    def fetch(self, shard: int, next_use: float, stop: threading.Event | None = None) -> Fetched:
        """Have a shard in the cache. stop: gives a download up at once.

        Raises OSError where the storage fails or the shard is damaged there, DownloadStopped after `stop`.
        """
        if self.cache is None:
            return Fetched.NO_ROOM
        if self._losses[shard] >= _MAX_LOSSES:
            return Fetched.REFUSED
        about = self.shards[shard]

        def download(descriptor: int) -> None:
            with writing(descriptor) as writer:
                self._download(shard, writer, stop or threading.Event())
            self.traffic.add_shard(about.num_bytes)

        return self.cache.fetch(self.cache_key(shard), about.num_bytes, download, next_use)

    def _download(self, shard: int, writer: CacheWriter, stop: threading.Event) -> None:
        """Write a shard to a file, several pieces at a time, each checked as it arrives."""
        with closing(IoThreads(_PIECES_AT_ONCE, "download-pieces")) as threads:
            numbers = range(len(self.shards[shard].pieces))
            left = {threads.submit(self._download_piece, shard, number, writer) for number in numbers}
            while left:
                done, left = wait(left, timeout=_TICK_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if left and stop.is_set():
                    raise DownloadStopped

    def _download_piece(self, shard: int, number: int, writer: CacheWriter) -> None:
        about, start = self.shards[shard], number * PIECE_BYTES
        stop = min(start + PIECE_BYTES, about.num_bytes)
        for _ in range(_TRIES):
            data = self.objects.get(self.key(shard), start, stop)
            if len(data) == stop - start and image_checksum(data).hex() == about.pieces[number]:
                writer.write(data, start)
                return
        raise OSError(
            f"{self.objects.uri}/{self.key(shard)}: bytes {start:,} to {stop:,} differ from the manifest's checksum "
            f"({_TRIES} tries); it was changed or damaged there: pack it again, or put it back"
        )


def in_pieces(source: ShardBytes, shard: int, num_bytes: int, checksums: Sequence[str] = ()) -> Iterator[bytes]:
    """Yield a whole shard in pieces. checksums (hex): theirs; a copy in the cache that differs gives way to the
    storage. Pieces that differ there are yielded as they are."""
    for number, start in enumerate(range(0, num_bytes, PIECE_BYTES)):
        length = min(PIECE_BYTES, num_bytes - start)
        try:
            checksum = bytes.fromhex(checksums[number]) if checksums else None
            piece = source.read(shard, start, length, checksum, compare=True)
        except ValueError:
            piece = source.read(shard, start, length)
        yield piece
