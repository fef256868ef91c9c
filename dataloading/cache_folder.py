"""What a cache keeps of itself in the folder `.instdisc-cache`: which files it made, and those that are being written.

FOLDER/.instdisc-cache/made/KEY    an empty file for each file that the cache made; "/" in its key is "%2F"
FOLDER/.instdisc-cache/parts/KEY   a file that is being written, locked by its writer
FOLDER/.instdisc-cache/room        the lock of whoever makes room, and an upper bound of the bytes that are used
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

MARK = ".instdisc-cache"
_TEXT = "This folder is used as a cache by instdisc. It removes what it made, listed in `made`, and nothing else.\n"
_MADE = ".made"
_POLL_S = 0.02
_OF_EARLIER_VERSIONS = ".room"
_NAMES_OF_EARLIER_VERSIONS = re.compile(r"[0-9a-f]{32}/\d{6,}\.tar|manifests/[0-9a-f]{32}\.arrow|demo/\w+-[0-9a-f]{16}")


@dataclass(frozen=True)
class MadeFile:
    """A whole file that the cache made."""

    key: str
    num_bytes: int
    next_use: float


class CacheFolder:
    """The cache's own files. Raises OSError where the disk fails."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, folder / MARK
        self._made, self._parts = self._mark / "made", self._mark / "parts"
        self.room = self._mark / "room"

    def prepare(self) -> None:
        """Mark the folder as a cache, if it is none yet."""
        if self._parts.is_dir():
            return
        self._made.mkdir(parents=True, exist_ok=True)
        (self._mark / "README").write_text(_TEXT)
        if (self._folder / _OF_EARLIER_VERSIONS).exists():
            self._take_over()
        self._parts.mkdir(exist_ok=True)

    def part(self, key: str) -> Path:
        """Return where a file is written."""
        return self._parts / f"{quote(key, safe='')}.part"

    def has_made(self, key: str) -> bool:
        """Whether the cache made the file of this key."""
        return self._entry(key).exists()

    def list_as_made(self, key: str) -> None:
        """Say that the file of this key is the cache's. To be called before it is there, with the room locked."""
        os.close(os.open(self._entry(key), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))

    def _entry(self, key: str) -> Path:
        return self._made / f"{quote(key, safe='')}{_MADE}"

    def remove(self, key: str) -> None:
        """Remove a file that the cache made. To be called with the room locked."""
        for path in (self._folder / key, self._entry(key)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def look(self) -> tuple[list[MadeFile], int]:
        """Return the cache's whole files, and the bytes of all its files; remove what dead writers left.

        To be called with the room locked.
        """
        files, used = [], 0
        for name in os.listdir(self._made):
            key = unquote(name.removesuffix(_MADE))
            try:
                status = os.lstat(self._folder / key)
            except (FileNotFoundError, NotADirectoryError):
                (self._made / name).unlink(missing_ok=True)
                continue
            if stat.S_ISREG(status.st_mode):
                used += status.st_size
                files.append(MadeFile(key, status.st_size, status.st_mtime))
        for name in os.listdir(self._parts):
            path = self._parts / name
            with contextlib.suppress(FileNotFoundError):
                with locked(path, create=False) as descriptor:
                    if descriptor is not None:
                        path.unlink()
                        continue
                used += path.stat().st_size
        return files, used

    def _take_over(self) -> None:
        """List the files that an earlier version made, which kept no list: by names that are nobody else's."""
        for path in (*self._folder.glob("*/*.tar"), *self._folder.glob("manifests/*"), *self._folder.glob("demo/*")):
            key = f"{path.parent.name}/{path.name}"
            if _NAMES_OF_EARLIER_VERSIONS.fullmatch(key):
                self.list_as_made(key)
        (self._folder / _OF_EARLIER_VERSIONS).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float = 0.0, create: bool = True) -> Iterator[int | None]:
    """Hold an exclusive lock on a file and yield its descriptor; None where another holds it for longer than wait_s."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    deadline = time.monotonic() + wait_s
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                    continue
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
