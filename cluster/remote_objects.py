"""The operations of a `Store` in memory, and on the file systems of fsspec that have no file of their own here."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import fsspec

from cluster.patience import Patience
from cluster.threads import failures_in_threads

_NUM_THREADS = 16
_VERSION_NAMES = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
"""What file systems of fsspec call that by which an object is known to be another one, the surest first."""
_memory_lock = threading.Lock()


class RemoteObjects:
    """Objects of a file system of fsspec that writes whole ones. Tries again what may pass; raises plain OSErrors."""

    errors: tuple[type[Exception], ...] = (OSError,)
    endpoint = None

    def __init__(self, protocol: str, patience: Patience) -> None:
        # Cached listings would hide what other processes write and delete.
        options: dict[str, Any] = {"use_listings_cache": False} if protocol != "memory" else {}
        self._files = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        self._call, self._in_memory = patience.call, protocol == "memory"

    def put(self, path: str, parts: Sequence[memoryview]) -> None:
        """Write the concatenated parts to `path`, replacing what is there."""
        data = b"".join(parts)
        self._call(lambda: self._files.pipe_file(path, data))

    def create(self, path: str, data: memoryview) -> None:
        """Write `data` to `path`. FileExistsError if there is something."""
        # fsspec's memory file system looks and then writes.
        with _memory_lock if self._in_memory else nullcontext():
            self._files.pipe_file(path, bytes(data), mode="create")

    def get(self, path: str, start: int | None, stop: int | None) -> bytes:
        """Return bytes [start, stop) of an object, fewer where it ends before."""
        return self._call(lambda: self._files.cat_file(path, start=start, end=stop))

    def read_into(
        self, path: str, target: memoryview, start: int, seen: Callable[[memoryview], None]
    ) -> tuple[int, bool]:
        """Fill `target` from byte `start` of an object on; see `Store.read_into`."""
        data = self.get(path, start, start + len(target) + 1)
        size = min(len(data), len(target))
        target[:size] = memoryview(data)[:size]
        seen(target[:size])
        return size, len(data) > size

    def list(self, folder: str) -> list[tuple[str, int]]:
        """Return (path, bytes) of all objects below a folder; [] where there is none."""
        return [(path, int(about["size"] or 0)) for path, about in self._found(folder).items()]

    def versions(self, folder: str) -> dict[str, str]:
        """Return what tells versions of the objects below a folder apart, by path; without those that have nothing."""
        found = {
            path: next((about[name] for name in _VERSION_NAMES if about.get(name)), None)
            for path, about in self._found(folder).items()
        }
        return {path: str(version) for path, version in found.items() if version is not None}

    def _found(self, folder: str) -> dict[str, dict[str, Any]]:
        with suppress(FileNotFoundError):
            return self._call(lambda: self._files.find(folder, detail=True))
        return {}

    def delete(self, path: str) -> None:
        """Remove an object. FileNotFoundError if there is none."""
        self._call(lambda: self._files.rm_file(path))

    def delete_many(self, paths: Sequence[str]) -> list[tuple[str, Exception]]:
        """Remove objects in threads; return those that stay, and why."""
        failed = failures_in_threads(self.delete, paths, _NUM_THREADS, self.errors)
        return [(path, error) for path, error in failed if not isinstance(error, FileNotFoundError)]

    def size(self, path: str) -> int:
        """Return an object's size in bytes. FileNotFoundError if there is none."""
        info = self._call(lambda: self._files.info(path))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "a folder, not an object", path)
        return info["size"]

    def remove_leftovers(self, folders: Sequence[str]) -> None:
        """Nothing to do: an interrupted write leaves no object."""
