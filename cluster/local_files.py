"""Durable files on a local folder: what has been written survives a crash of the process and of the machine.

A file appears under its name whole or not at all. It is written beside its place under a temporary name and synced,
then renamed (replace) or hard-linked (create: a link never overwrites), and the folder is synced, because a name
lives in its folder and not in the file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from uuid import uuid4

from cluster.threads import failures_in_threads

TEMPORARY = ".tmp-"
_NUM_THREADS = 8
_PIECE_BYTES = 2**18
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalFiles:
    """The operations of a `Store` on absolute paths of a local file system. Raises plain OSErrors."""

    errors: tuple[type[Exception], ...] = (OSError,)
    endpoint = None

    def put(self, path: str, parts: Sequence[memoryview]) -> None:
        """Write the concatenated parts to `path`, replacing what is there in one step."""
        temporary = _write_temporary(path, parts)
        try:
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _sync_folder(os.path.dirname(path))

    def create(self, path: str, data: memoryview) -> None:
        """Write `data` to `path`. FileExistsError if it is there already: of several writers, one succeeds."""
        temporary = _write_temporary(path, [data])
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                raise OSError(errno.EOPNOTSUPP, "this file system has no hard links", path) from error
            raise
        finally:
            _remove(temporary)
        _sync_folder(os.path.dirname(path))

    def get(self, path: str, start: int | None, stop: int | None) -> bytes:
        """Return bytes [start, stop) of a file, fewer where it ends before."""
        with open(path, "rb") as file:
            start = file.seek(start or 0)
            if stop is None:
                return file.read()
            # Memory for what is there, not for what was asked for.
            return file.read(max(min(stop, os.fstat(file.fileno()).st_size) - start, 0))

    def read_into(
        self, path: str, target: memoryview, start: int, seen: Callable[[memoryview], None]
    ) -> tuple[int, bool]:
        """Fill `target` from byte `start` of a file on; see `Store.read_into`."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(target):
                piece = target[done : done + _PIECE_BYTES]
                size = os.preadv(descriptor, [piece], start + done)
                if size == 0:
                    break
                seen(piece[:size])
                done += size
            return done, os.fstat(descriptor).st_size > start + done
        finally:
            os.close(descriptor)

    def list(self, folder: str) -> list[tuple[str, int]]:
        """Return (path, bytes) of all files below a folder, temporary ones excepted; [] where there is no folder."""
        return [(path, status.st_size) for path, status in _files(folder)]

    def versions(self, folder: str) -> dict[str, str]:
        """Return the times of all files below a folder, as they were written last, by path."""
        return {path: str(status.st_mtime_ns) for path, status in _files(folder)}

    def delete(self, path: str) -> None:
        """Remove a file. FileNotFoundError if there is none."""
        os.unlink(path)

    def size(self, path: str) -> int:
        """Return a file's size in bytes. FileNotFoundError if there is none."""
        if os.path.isdir(path):
            raise FileNotFoundError(errno.ENOENT, "a folder, not a file", path)
        return os.stat(path).st_size

    def delete_many(self, paths: Sequence[str]) -> list[tuple[str, Exception]]:
        """Remove files, in threads as a folder may lie behind a network; return those that stay, and why."""
        failed = failures_in_threads(self.delete, paths, _NUM_THREADS, self.errors)
        return [(path, error) for path, error in failed if not isinstance(error, FileNotFoundError)]

    def remove_leftovers(self, folders: Sequence[str]) -> None:
        """Remove the temporary files and empty folders that killed writers left below folders."""
        for folder in folders:
            for path in _walk(folder):
                if os.path.basename(path).startswith(TEMPORARY):
                    _remove(path)
            for current, _, _ in os.walk(folder, topdown=False):
                with suppress(OSError):
                    os.rmdir(current)


def _write_temporary(path: str, parts: Sequence[memoryview]) -> str:
    folder = os.path.dirname(path)
    _make_folder(folder)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid4().hex}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            for part in parts:
                done = 0
                while done < len(part):
                    done += os.write(descriptor, part[done:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        _remove(temporary)
        raise
    return temporary


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "a file stands where a folder is needed", folder) from None
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    for path in _walk(folder):
        if not os.path.basename(path).startswith(TEMPORARY):
            with suppress(FileNotFoundError):  # removed meanwhile
                yield path, os.stat(path)


def _walk(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        # A folder that vanishes under the walk was emptied by retention: nothing is left in it.
        if not isinstance(error, FileNotFoundError):
            raise error

    return [os.path.join(current, name) for current, _, names in os.walk(folder, onerror=refuse) for name in names]


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
