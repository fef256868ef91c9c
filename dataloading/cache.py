"""Files of a remote data set on this machine's disk, shared by all its workers and by all its jobs.

A file appears whole under its name or not at all: it is written elsewhere under a file lock, which the system takes
from a process that dies, synced, and renamed. So each file has one downloader, and whatever is left of a killed one is
taken over or removed. The modification time of a file is the time at which it is expected to be needed next; when room
is wanted the file whose use is farthest away goes first (Belady 1966), and before it what nobody used for an hour after
its time: its job is gone. A reader that has a file open keeps it although it is removed.

A folder that is used as a cache has a mark, the folder `.instdisc-cache`, which lists what the cache made; nothing else
is ever removed or replaced, whatever it is called.

No failure of the cache is one of training: without room, without locks, or on a disk that is full or read-only, readers
go to the storage itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dataloading.cache_folder import CacheFolder, MadeFile, locked

_LOG = logging.getLogger("instdisc.cache")
OVERDUE_S = 3600.0
"""A file that was not touched for so long after the time of its expected use belongs to a job that is gone."""
_KEPT_FREE_SHARE = 0.05
_RETRY_AFTER_S = 60.0
_ROOM_WAIT_S = 60.0
"""How long another process may take to make room before it is left alone."""
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_DISK_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
        *(errno.EFBIG, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO),
    }
)
"""What writing to a disk may raise in a download; anything else there is the storage's."""


class Fetched(Enum):
    """What came of a wish to have a file in the cache."""

    THERE = "there"
    BUSY = "another process is downloading it"
    NO_ROOM = "no room: everything here is needed sooner"
    REFUSED = "the disk refuses (full, read-only, without locks, no permission)"


class _StorageFailed(Exception):
    """A download failed, and not for this machine's disk."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Wish:
    """A file that somebody wants to have here."""

    key: str
    num_bytes: int
    download: Callable[[int], None]
    next_use: float


class ShardCache:
    """Files under a folder, in all at most `limit_bytes`; None: all of the disk but 5 %. Safe in threads, picklable."""

    def __init__(self, folder: str | Path, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit of the cache: found {limit_bytes} bytes, expected at least 0")
        self.folder = Path(os.path.expanduser(folder)).absolute()
        self.limit_bytes = limit_bytes
        self._own = CacheFolder(self.folder)
        self._refused_until = 0.0
        self._told: set[str] = set()

    def __reduce__(self):
        return ShardCache, (self.folder, self.limit_bytes)

    def path(self, key: str) -> Path:
        """Return where a file is, if it is there. Raises ValueError for a key that would leave the folder."""
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"key {key!r} in the cache {self.folder}: expected a relative path below it")
        return self.folder / key

    def open(self, key: str) -> int | None:
        """Return a file descriptor, which the caller closes, None where the file is not there."""
        try:
            return os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None

    def fetch(self, key: str, num_bytes: int, download: Callable[[int], None], next_use: float) -> Fetched:
        """Have a file in the cache; download(file descriptor) writes it, in one process at a time.

        next_use: when it is needed (seconds since 1970). Raises what `download` raises, other than errors of the disk.
        """
        path = self.path(key)
        if _is_whole(path, num_bytes):
            self.touch(key, next_use)
            return Fetched.THERE
        if time.monotonic() < self._refused_until:
            return Fetched.REFUSED
        try:
            return self._fetch(path, _Wish(key, num_bytes, download, next_use))
        except _StorageFailed as failed:
            raise failed.error from failed.error.__cause__
        except OSError as error:
            self._refused_until = time.monotonic() + _RETRY_AFTER_S
            self._tell(error.strerror or str(error))
            return Fetched.REFUSED

    def touch(self, key: str, next_use: float) -> None:
        """Say when a file is expected to be needed next, if no other user needs it sooner."""
        path = self.path(key)
        with contextlib.suppress(OSError):
            now, known = time.time(), path.stat().st_mtime
            if not now < known < next_use:
                os.utime(path, (now, next_use))

    def remove(self, key: str) -> None:
        """Take a file out, as one that turned out damaged."""
        path = self.path(key)
        with contextlib.suppress(OSError):
            if self._own.has_made(key):
                path.unlink()

    def _fetch(self, path: Path, wish: _Wish) -> Fetched:
        self._own.prepare()
        part = self._own.part(wish.key)
        with locked(part) as descriptor:
            if descriptor is None:
                return Fetched.BUSY
            is_renamed = False
            try:
                if _is_whole(path, wish.num_bytes):
                    return Fetched.THERE
                if os.path.lexists(path) and not self._own.has_made(wish.key):
                    self._tell(f"{path} is not the cache's")
                    return Fetched.REFUSED
                fetched = self._fill(path, part, descriptor, wish)
                is_renamed = fetched is Fetched.THERE
                return fetched
            finally:
                if not is_renamed:  # else the name may be that of another process's file by now
                    with contextlib.suppress(OSError):
                        part.unlink()

    def _fill(self, path: Path, part: Path, descriptor: int, wish: _Wish) -> Fetched:
        # One process at a time looks for room and takes it; the room is taken before the download, not after.
        with locked(self._own.room, wait_s=_ROOM_WAIT_S) as room:
            if room is None:
                return Fetched.BUSY
            os.ftruncate(descriptor, 0)
            if not self._make_room(room, wish.num_bytes, wish.next_use):
                return Fetched.NO_ROOM
            _allocate(descriptor, wish.num_bytes)
        try:
            wish.download(descriptor)
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise
            raise _StorageFailed(error) from error
        # Without it a power cut may leave a file of the right size whose bytes never reached the disk.
        os.fsync(descriptor)
        os.utime(descriptor, (time.time(), wish.next_use))
        with locked(self._own.room, wait_s=_ROOM_WAIT_S) as room:
            if room is None:
                return Fetched.BUSY
            path.parent.mkdir(parents=True, exist_ok=True)
            self._own.list_as_made(wish.key)
            os.replace(part, path)
        return Fetched.THERE

    def _make_room(self, room: int, wanted: int, needed_at: float) -> bool:
        """Remove what is needed latest until `wanted` bytes fit; False where all is needed sooner than the new file.

        room: the file that holds an upper bound of the bytes that are used. While the new file fits below the limit
        with that, nobody looks at all files: filling a cache takes time in proportion to its files, not to the square.
        """
        used = _read_number(room)
        files: list[MadeFile] | None = None
        if used is None or (self.limit_bytes is not None and used + wanted > self.limit_bytes):
            files, used = self._own.look()
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize - int(_KEPT_FREE_SHARE * disk.f_blocks * disk.f_frsize)
        missing = wanted - free
        if self.limit_bytes is not None:
            missing = max(missing, used + wanted - self.limit_bytes)
        if missing > 0:
            files, used = (files, used) if files is not None else self._own.look()
            removed = self._remove_latest(files, missing, needed_at)
            if removed is None:
                _write_number(room, used)
                return False
            used -= removed
        _write_number(room, used + wanted)
        return True

    def _remove_latest(self, files: list[MadeFile], missing: int, needed_at: float) -> int | None:
        """Remove files of at least `missing` bytes; return how many bytes they had, None where nothing may go."""
        now = time.time()
        overdue = [f for f in files if f.next_use < now - OVERDUE_S]
        later = [f for f in files if f.next_use > max(now, needed_at)]
        removable = sorted(overdue, key=lambda f: f.next_use) + sorted(later, key=lambda f: -f.next_use)
        if sum(file.num_bytes for file in removable) < missing:
            return None
        removed = 0
        for file in removable:
            if removed >= missing:
                break
            self._own.remove(file.key)
            removed += file.num_bytes
        return removed

    def _tell(self, why: str) -> None:
        text = f"cache {self.folder}: {why}; images are read from the storage itself until it works again"
        if text not in self._told:
            self._told.add(text)
            _LOG.warning(text)


class CacheWriter:
    """Writes to a file of the cache from several threads, until it is closed.

    A thread whose read from the storage was given up must not write to a descriptor that is another file's by then.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._lock = threading.Lock()

    def write(self, data: bytes, start: int) -> None:
        """Write all of `data` at a place of the file; the system may take it in parts."""
        with self._lock:
            written = 0
            while self._descriptor is not None and written < len(data):
                written += os.pwrite(self._descriptor, memoryview(data)[written:], start + written)

    def close(self) -> None:
        """Write nothing from now on."""
        with self._lock:
            self._descriptor = None


@contextmanager
def writing(descriptor: int) -> Iterator[CacheWriter]:
    """Yield a writer that is closed afterwards."""
    writer = CacheWriter(descriptor)
    try:
        yield writer
    finally:
        writer.close()


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _allocate(descriptor: int, num_bytes: int) -> None:
    if num_bytes:
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise


def _read_number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, f"{max(0, number):020d}".encode(), 0)
