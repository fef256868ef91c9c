"""One way to read and write objects on a local folder, in memory and on S3.

A store is a URI; an object is a key relative to it ("attempts/000001.json") and its bytes. An object appears whole
or not at all, and `create` never overwrites: of several writers of one key exactly one wins. The checkpoint format
rests on these two promises and on nothing else.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeAlias

import fsspec

from cluster.local_files import TEMPORARY, LocalFiles
from cluster.patience import PATIENCE_S, Patience

Buffer: TypeAlias = bytes | bytearray | memoryview

_CREATING = ("file", "memory", "s3")
"""Protocols on which `create` lets exactly one writer win; from others of fsspec's images are read."""
_WEB = ("http", "https")
"""Protocols without a way to list, to write whole objects or to ask for a part and get just that."""
_S3_CONFIG = {"max_pool_connections": 64, "connect_timeout": 5, "read_timeout": 30}
_ADVICE = {
    errno.EACCES: "no permission; check the owner and the rights of this place, or choose another URI",
    errno.ENOSPC: "the disk is full; free space there, or choose another URI",
    errno.EDQUOT: "the disk quota is used up; free space there, or choose another URI",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another URI",
    errno.EISDIR: "a folder stands where a file is expected; choose another URI",
    errno.EROFS: "the file system is read-only; mount it writable, or choose another URI",
    errno.EIO: "the disk reports an input/output error; check its health, or choose another URI",
    errno.EOPNOTSUPP: "checkpoints on a folder need hard links; choose a local disk, NFS or s3://",
}
_ADVICE[errno.EPERM] = _ADVICE[errno.EACCES]
_memory_lock = threading.Lock()


class StoreError(OSError):
    """A store cannot do what was asked: the text says what, where, why and what to do."""


class ObjectMissingError(StoreError, FileNotFoundError):
    """There is no object under the key."""


class _Backend(Protocol):
    @property
    def errors(self) -> tuple[type[Exception], ...]: ...
    def put(self, path: str, parts: Sequence[memoryview]) -> None: ...
    def create(self, path: str, data: memoryview) -> None: ...
    def get(self, path: str, start: int | None, stop: int | None) -> bytes: ...
    def list(self, folder: str) -> list[tuple[str, int]]: ...
    def delete(self, path: str) -> None: ...
    def size(self, path: str) -> int: ...
    def remove_leftovers(self, folder: str) -> None: ...


class Store:
    """Objects under a URI: a path, file://, memory://, s3:// or another protocol of fsspec. Safe in threads; pickles
    as its URI.

    Every method raises `StoreError` when the storage fails and ValueError for a key that is not relative; what is
    written has a plain key (`check_key`), what is read may have any that lies inside. Reads are tried again, for
    minutes, where a remote storage answered before and does not now.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.protocol, self.root = _split(os.fspath(uri))
        self.uri = self.root if self.protocol == "file" else f"{self.protocol}://{self.root.lstrip('/')}"
        self._connection: tuple[int, _Backend] | None = None
        self._patience = Patience(self.uri, 0.0 if self.protocol in ("file", "memory") else PATIENCE_S)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def put(self, key: str, *parts: Buffer) -> None:
        """Write an object, the concatenation of `parts`, replacing what is there. It is durable on return.

        parts: bytes or one-dimensional views of bytes; S3 and memory copy them, a folder does not.
        """
        with self._explained("write", key):
            self._backend().put(self._path(key), [memoryview(part) for part in parts])

    def create(self, key: str, data: Buffer) -> bool:
        """Write an object unless there is one: True if this call wrote it, False if the key was taken.

        A False can also mean that this writer's own earlier try succeeded and its answer was lost: see `claim`.
        """
        if self.protocol not in _CREATING:
            raise StoreError(
                f"cannot create {key!r} in {self.uri}: of {self.protocol}:// it is not known that one of several "
                "writers wins; use a folder or s3:// for a run"
            )
        with self._explained("create", key):
            try:
                self._backend().create(self._path(key), memoryview(data))
            except FileExistsError:
                return False
        return True

    def claim(self, key: str, data: Buffer) -> bool:
        """Create an object, or find exactly these bytes there: True unless the key holds something else.

        With bytes that no one else would write (a random token among them) True means: the key is ours.
        """
        return self.create(key, data) or self.get(key) == bytes(data)

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return an object's bytes [start, stop), fewer where it ends before. ObjectMissingError if there is none."""
        with self._explained("read", key):
            path = self._path_to_read(key)
            return self._patience.call(lambda: self._backend().get(path, start, stop))

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted. What interrupted writers left never appears."""
        return [key for key, _ in self.list_sizes(prefix)]

    def list_sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        """Return (key, bytes) of the objects whose keys begin with `prefix`, sorted by key."""
        with self._explained("list", prefix):
            folder = prefix.rpartition("/")[0]
            where = self._path(folder) if folder else self.root
            found = self._patience.call(lambda: self._backend().list(where))
        start = len(self.root.rstrip("/")) + 1
        return sorted((path[start:], size) for path, size in found if path[start:].startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with self._explained("delete", key), suppress(FileNotFoundError):
            self._backend().delete(self._path(key))

    def size(self, key: str) -> int:
        """Return an object's size in bytes. ObjectMissingError if there is none."""
        with self._explained("read the size of", key):
            path = self._path_to_read(key)
            return self._patience.call(lambda: self._backend().size(path))

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        try:
            self.size(key)
        except ObjectMissingError:
            return False
        return True

    def remove_leftovers(self, folder: str) -> None:
        """Remove what killed writers left below a folder that nobody writes to any more."""
        with self._explained("clean up", folder):
            self._backend().remove_leftovers(self._path(folder))

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self.root.rstrip('/')}/{key}"

    def _path_to_read(self, key: str) -> str:
        _check_inside(key)
        return f"{self.root.rstrip('/')}/{key}"

    def _backend(self) -> _Backend:
        # fsspec's event loop does not survive a fork: every process makes a connection of its own.
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = os.getpid(), LocalFiles() if self.protocol == "file" else _Remote(self.protocol)
        return self._connection[1]

    @contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except self._backend().errors as error:
            raise _explain(error, f"cannot {action} {key or 'the keys'!r} in {self.uri}") from error


class _Remote:
    """The operations of a `Store` on a file system of fsspec that writes whole objects."""

    def __init__(self, protocol: str) -> None:
        # Cached listings would hide what other processes write and delete.
        options: dict[str, Any] = {"use_listings_cache": False} if protocol != "memory" else {}
        if protocol == "s3":
            options["config_kwargs"] = _S3_CONFIG
        self._files = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        self._protocol, self._in_memory = protocol, protocol == "memory"

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        if self._protocol != "s3":
            return (OSError,)
        from botocore.exceptions import BotoCoreError, ClientError

        return (OSError, BotoCoreError, ClientError)

    def put(self, path: str, parts: Sequence[memoryview]) -> None:
        self._files.pipe_file(path, b"".join(parts))

    def create(self, path: str, data: memoryview) -> None:
        # fsspec's memory file system looks and then writes; S3 decides on the server.
        with _memory_lock if self._in_memory else nullcontext():
            self._files.pipe_file(path, bytes(data), mode="create")

    def get(self, path: str, start: int | None, stop: int | None) -> bytes:
        return self._files.cat_file(path, start=start, end=stop)

    def list(self, folder: str) -> list[tuple[str, int]]:
        with suppress(FileNotFoundError):
            found = self._files.find(folder, detail=True)
            return [(path, int(about["size"] or 0)) for path, about in found.items()]
        return []

    def delete(self, path: str) -> None:
        self._files.rm_file(path)

    def size(self, path: str) -> int:
        info = self._files.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "a folder, not an object", path)
        return info["size"]

    def remove_leftovers(self, folder: str) -> None:
        """Nothing to do: an interrupted write leaves no object."""


def check_key(key: str) -> None:
    """Raise ValueError unless `key` may be written: a relative path without '.', '..', empty or temporary parts.

    Nor may it hold characters that look like others or like nothing: a person has to find it.
    """
    _check_inside(key)
    for part in key.removesuffix("/").split("/"):
        if part.startswith(TEMPORARY) or "\\" in part or not part.isprintable():
            raise ValueError(f"key: found {key!r}, expected a relative path such as 'attempts/000001.json'")


def _check_inside(key: str) -> None:
    """Raise ValueError for a key that is absolute, or that a folder would take for a place outside of it or twice.

    A bucket has keys that a folder cannot have ("a//b.jpg"): they are refused too.
    """
    if not {"", ".", ".."}.isdisjoint(key.removesuffix("/").split("/")):
        raise ValueError(
            f"key: found {key!r}, expected a relative path without empty parts, '.' and '..', such as "
            "'attempts/000001.json'; rename the object"
        )


def _split(uri: str) -> tuple[str, str]:
    """Return (protocol, root). Local roots are absolute, so that a store means the same place in any process."""
    protocol, separator, rest = uri.partition("://")
    if not separator:
        protocol, rest = "file", uri
    if protocol not in fsspec.available_protocols():
        raise ValueError(f"URI {uri!r}: found {protocol}://, expected a folder, file://, s3:// or what fsspec knows")
    if protocol in _WEB:
        raise ValueError(
            f"URI {uri!r}: found a web server, which cannot be listed; expected a folder, file://, s3:// or another "
            "object store of fsspec (gs://, az://). Copy the files to one of these, or name the bucket by its s3:// URI"
        )
    if not (rest if protocol == "file" else rest.strip("/")):
        raise ValueError(f"URI {uri!r}: found no {'bucket' if protocol == 's3' else 'folder'} in it")
    if protocol == "file":
        return protocol, os.path.abspath(os.path.expanduser(rest))
    return protocol, "/" + rest.strip("/") if protocol == "memory" else rest.rstrip("/")


def _explain(error: Exception, what: str) -> StoreError:
    if isinstance(error, FileNotFoundError):
        if what.startswith(("cannot write", "cannot create")):
            return StoreError(f"{what}: the bucket or folder is not there; create it, or choose another URI ({error})")
        return ObjectMissingError(f"{what}: it is not there")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, PermissionError) and number not in _ADVICE:
        number = errno.EACCES
    advice = f": {_ADVICE[number]}" if number in _ADVICE else ""
    return StoreError(f"{what}{advice} ({type(error).__name__}: {error})")
