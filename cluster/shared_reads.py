"""Objects that every rank of a machine needs, read from the storage by one of them and handed on in a file.

No rank waits for what another one does but for the reading itself, under a lock that ends with its process. Where no
file can be shared, every rank reads for itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
from contextlib import suppress

from cluster.store import Store
from cluster.stored_object import StoredObject, has_digest, read_object


class SharedReads:
    """Reads objects of a store once for all processes of this user and machine that do so at the same time.

    `clear` removes the files when all ranks have read; what a killed process leaves, the next one of the run removes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        name = hashlib.sha256(store.uri.encode()).hexdigest()[:16]
        self._folder = os.path.join(tempfile.gettempdir(), f"instdisc-{os.getuid()}-{name}")

    def read(self, stored: StoredObject, num_threads: int) -> bytearray | mmap.mmap:
        """Return an object's bytes, which may be changed and are nobody else's. Errors as `read_object`."""
        path = os.path.join(self._folder, stored.checksum.replace(":", "-"))
        try:
            self._make_folder()
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return read_object(self._store, stored, num_threads)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                return read_object(self._store, stored, num_threads)
            found = _mapped(path, stored)
            if found is None:
                found = read_object(self._store, stored, num_threads)
                with suppress(OSError):
                    _write(path, found)
            return found
        finally:
            os.close(lock)

    def clear(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_folder(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)
        found = os.lstat(self._folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{self._folder} is not a folder of this user alone")


def _mapped(path: str, stored: StoredObject) -> mmap.mmap | None:
    """Return the memory of a file that holds an object, None if it does not."""
    try:
        with open(path, "rb") as file:
            if stored.num_bytes == 0 or os.fstat(file.fileno()).st_size != stored.num_bytes:
                return None
            found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return None
    return found if has_digest(stored, found) else None


def _write(path: str, data: bytearray | mmap.mmap) -> None:
    try:
        with open(f"{path}.new", "wb") as file:
            file.write(data)
        os.replace(f"{path}.new", path)
    except OSError:
        with suppress(OSError):
            os.unlink(f"{path}.new")
        raise
