"""Files of a remote data set on this machine's disk, shared by all its workers and by all its jobs.

A file appears whole under its name or not at all: it is written as NAME.part under a file lock, which the system takes
from a process that dies, and renamed. So each file has one downloader, and whatever is left of a killed one is taken
over or removed. The modification time of a file is the time at which it is expected to be needed next; when room is
wanted the file whose use is farthest away goes first (Belady 1966), and before it what nobody used for an hour after
its time: its job is gone. A reader that has a file open keeps it although it is removed.

No failure of the cache is one of training: without room, or on a disk that is full or read-only, readers go to the
storage itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_LOG = logging.getLogger("instdisc.cache")
_PART = ".part"
OVERDUE_S = 3600.0
"""A file that was not touched for so long after the time of its expected use belongs to a job that is gone."""
_KEPT_FREE_SHARE = 0.05
_RETRY_AFTER_S = 60.0


class Fetched(Enum):
    """What came of a wish to have a file in the cache."""

    THERE = "there"
    BUSY = "another process is downloading it"
    NO_ROOM = "no room: everything here is needed sooner"
    REFUSED = "the disk refuses (full, read-only, no permission)"


@dataclass(frozen=True)
class _Entry:
    path: Path
    num_bytes: int
    next_use: float


class ShardCache:
    """Files under a folder, in all at most `limit_bytes`; None: all of the disk but 5 %. Safe in threads, picklable."""

    def __init__(self, folder: str | Path, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit of the cache: found {limit_bytes} bytes, expected at least 0")
        self.folder = Path(os.path.expanduser(folder)).absolute()
        self.limit_bytes = limit_bytes
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
        if self._is_whole(path, num_bytes):
            self.touch(key, next_use)
            return Fetched.THERE
        if time.monotonic() < self._refused_until:
            return Fetched.REFUSED
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(path.name + _PART)) as descriptor:
                if descriptor is None:
                    return Fetched.BUSY
                if self._is_whole(path, num_bytes):
                    return Fetched.THERE
                return self._fill(path, descriptor, num_bytes, download, next_use)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            self._refuse(error)
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
        with contextlib.suppress(OSError):
            self.path(key).unlink()

    def _is_whole(self, path: Path, num_bytes: int) -> bool:
        try:
            return path.stat().st_size == num_bytes
        except OSError:
            return False

    def _fill(
        self, path: Path, descriptor: int, num_bytes: int, download: Callable[[int], None], next_use: float
    ) -> Fetched:
        part = path.with_name(path.name + _PART)
        done = False
        try:
            # One process at a time looks for room and takes it; the room is taken before the download, not after.
            with _locked(self.folder / ".room", wait=True):
                os.ftruncate(descriptor, 0)
                if not self._make_room(num_bytes, next_use):
                    return Fetched.NO_ROOM
                if num_bytes:
                    os.posix_fallocate(descriptor, 0, num_bytes)
            download(descriptor)
            os.utime(descriptor, (time.time(), next_use))
            os.replace(part, path)
            done = True
            return Fetched.THERE
        finally:
            if not done:
                with contextlib.suppress(OSError):
                    part.unlink()

    def _make_room(self, wanted: int, needed_at: float) -> bool:
        """Remove what is needed latest until `wanted` bytes fit; False where all is needed sooner than the new file."""
        entries, used = self._entries()
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize - int(_KEPT_FREE_SHARE * disk.f_blocks * disk.f_frsize)
        missing = wanted - free
        if self.limit_bytes is not None:
            missing = max(missing, used + wanted - self.limit_bytes)
        if missing <= 0:
            return True
        now = time.time()
        overdue = [e for e in entries if e.next_use < now - OVERDUE_S]
        later = [e for e in entries if e.next_use > max(now, needed_at)]
        removable = sorted(overdue, key=lambda e: e.next_use) + sorted(later, key=lambda e: -e.next_use)
        if sum(entry.num_bytes for entry in removable) < missing:
            return False
        for entry in removable:
            if missing <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                entry.path.unlink()
            missing -= entry.num_bytes
        return True

    def _entries(self) -> tuple[list[_Entry], int]:
        """Return the whole files, and the bytes of all files; remove what dead downloaders left."""
        entries, used = [], 0
        for current, _, names in os.walk(self.folder):
            for name in names:
                path = Path(current, name)
                with contextlib.suppress(FileNotFoundError):
                    if name.endswith(_PART):
                        with _locked(path, create=False) as descriptor:
                            if descriptor is not None:
                                path.unlink()
                                continue
                    status = path.stat()
                    used += status.st_size
                    if not name.endswith(_PART) and name != ".room":
                        entries.append(_Entry(path, status.st_size, status.st_mtime))
        return entries, used

    def _refuse(self, error: OSError) -> None:
        self._refused_until = time.monotonic() + _RETRY_AFTER_S
        text = f"cache {self.folder}: {error.strerror}; images are read from the storage itself until it works again"
        if text not in self._told:
            self._told.add(text)
            _LOG.warning(text)


_DISK_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
        *(errno.ENOTDIR, errno.ENOENT, errno.EEXIST),
    }
)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = False, create: bool = True) -> Iterator[int | None]:
    """Hold an exclusive lock on a file and yield its descriptor; None where another process holds it."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            # The holder before us may have renamed or removed the file that we opened: then it is another by now.
            if not _is_same(descriptor, path):
                continue
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
