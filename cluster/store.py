"""One way to read and write objects on a local folder, in memory and on S3.

A store is a URI; an object is a key relative to it ("attempts/000001.json") and its bytes. An object appears whole
or not at all, and `create` never overwrites: of several writers of one key exactly one wins. The checkpoint format
rests on these two promises and on nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TypeAlias

import fsspec

from cluster import patience
from cluster.credentials import without_credentials
from cluster.local_files import TEMPORARY, LocalFiles
from cluster.patience import Patience
from cluster.remote_objects import RemoteObjects
from cluster.store_errors import ObjectMissingError, StoreError, explain

if TYPE_CHECKING:
    from cluster.s3_objects import S3Objects

__all__ = ["Buffer", "ObjectMissingError", "Store", "StoreError", "check_key"]

Buffer: TypeAlias = bytes | bytearray | memoryview
Seen: TypeAlias = Callable[[memoryview], None]

_CREATING = ("file", "memory", "s3")
"""Protocols on which `create` lets exactly one writer win; from others of fsspec's images are read."""
_WEB = ("http", "https")
"""Protocols without a way to list, to write whole objects or to ask for a part and get just that."""


class _Backend(Protocol):
    @property
    def errors(self) -> tuple[type[Exception], ...]: ...
    @property
    def endpoint(self) -> str | None: ...
    def put(self, path: str, parts: Sequence[memoryview]) -> None: ...
    def create(self, path: str, data: memoryview) -> None: ...
    def get(self, path: str, start: int | None, stop: int | None) -> bytes: ...
    def read_into(self, path: str, target: memoryview, start: int, seen: Seen) -> tuple[int, bool]: ...
    def list(self, folder: str) -> list[tuple[str, int]]: ...
    def versions(self, folder: str) -> dict[str, str]: ...
    def delete(self, path: str) -> None: ...
    def delete_many(self, paths: Sequence[str]) -> list[tuple[str, Exception]]: ...
    def size(self, path: str) -> int: ...
    def remove_leftovers(self, folders: Sequence[str]) -> None: ...


class Store:
    """Objects under a URI: a path, file://, memory://, s3:// or another protocol of fsspec. Safe in threads; pickles
    as its URI.

    Every method raises `StoreError` when the storage fails and ValueError for a key that is not relative; what is
    written has a plain key (`check_key`), what is read may have any that lies inside. What fails in passing is tried
    again, for minutes (`patience_s`, by default 300 s) where a remote storage answered before, for seconds where it
    never did.
    """

    def __init__(self, uri: str | os.PathLike[str], *, patience_s: float | None = None) -> None:
        self.protocol, self.root = _split(os.fspath(uri))
        self.uri = self.root if self.protocol == "file" else f"{self.protocol}://{self.root.lstrip('/')}"
        self.shown = without_credentials(self.uri)
        """The URI for messages and logs."""
        self._connection: tuple[int, _Backend] | None = None
        limit_s = patience.PATIENCE_S if patience_s is None else patience_s
        self._patience = Patience(self.shown, 0.0 if self.protocol in ("file", "memory") else limit_s)
        self._can_replace = True

    def __repr__(self) -> str:
        return f"Store({self.shown!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @property
    def is_exclusive(self) -> bool:
        """Whether `create` may be used here, without which no run can be kept."""
        return self.protocol in _CREATING

    def put(self, key: str, *parts: Buffer) -> None:
        """Write an object, the concatenation of `parts`, replacing what is there. It is durable on return.

        parts: bytes or one-dimensional views of bytes, which nothing may change meanwhile. A folder and S3 do not copy
        them, memory does.
        """
        with self._explained("write", key):
            self._backend().put(self._path(key), [memoryview(part) for part in parts])

    def create(self, key: str, data: Buffer) -> bool:
        """Write an object unless there is one: True if this call wrote it, False if the key was taken.

        A False can also mean that this writer's own earlier try succeeded and its answer was lost: see `claim`.
        """
        if not self.is_exclusive:
            raise StoreError(
                f"cannot create {key!r} in {self.shown}: of {self.protocol}:// it is not known that one of several "
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
            return self._backend().get(path, start, stop)

    def read_into(self, key: str, target: memoryview, start: int, seen: Seen) -> tuple[int, bool]:
        """Fill `target` with an object's bytes from `start` on; return how many there were, and whether more follow.

        seen: gets the filled parts of `target` in order, while the processor's caches still hold them. Raises
        ObjectMissingError as `get`; what is in `target` after an error is undefined.
        """
        with self._explained("read", key):
            path = self._path_to_read(key)
            return self._backend().read_into(path, target, start, seen)

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted. What interrupted writers left never appears."""
        return [key for key, _ in self.list_sizes(prefix)]

    def list_sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        """Return (key, bytes) of the objects whose keys begin with `prefix`, sorted by key."""
        with self._explained("list", prefix):
            folder = prefix.rpartition("/")[0]
            where = self._path(folder) if folder else self.root
            found = self._backend().list(where)
        start = len(self.root.rstrip("/")) + 1
        return sorted((path[start:], size) for path, size in found if path[start:].startswith(prefix))

    def versions(self) -> dict[str, str]:
        """Return, by key, what tells an object apart from one that takes its place (an ETag, the time of a file).

        Objects of which a storage says no such thing are left out.
        """
        with self._explained("list", ""):
            found = self._backend().versions(self.root)
        start = len(self.root.rstrip("/")) + 1
        return {path[start:]: version for path, version in found.items()}

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with self._explained("delete", key), suppress(FileNotFoundError):
            self._backend().delete(self._path(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove objects, in bulk where the storage has that, else in threads; those that are gone do not matter.

        StoreError if any of them stays: the others are removed nevertheless.
        """
        if not keys:
            return
        with self._explained("delete", keys[0]):
            failed = self._backend().delete_many([self._path(key) for key in keys])
        if failed:
            path, error = failed[0]
            what = f"cannot delete {path[len(self.root.rstrip('/')) + 1 :]!r} in {self.shown}"
            if len(failed) > 1:
                what += ", among others"  # how many differs from time to time, and who is told remembers the text
            raise explain(error, what, self._backend().endpoint) from error

    def get_tagged(self, key: str, stop: int) -> tuple[bytes, str | None]:
        """Return an object's bytes [0, stop), and what `replace` knows it by; None where that makes no difference."""
        if self.protocol != "s3":
            return self.get(key, 0, stop), None
        with self._explained("read", key):
            return self._of_s3().get_tagged(self._path_to_read(key), stop)

    def replace(self, key: str, data: Buffer, tag: str | None) -> bool:
        """Write an object unless it has changed since `get_tagged` returned this tag: False if it has.

        Where the storage has no such writes, or has them and refuses always, it is written in any case: who relies on
        the answer looks at what is there later.
        """
        if tag is None or self.protocol != "s3" or not self._can_replace:
            self.put(key, data)
            return True
        with self._explained("write", key):
            is_done = self._of_s3().replace(self._path(key), memoryview(data), tag)
        if is_done:
            return True
        try:
            found = self.get_tagged(key, len(data) + 1)
        except ObjectMissingError:
            return False
        if is_done is None or found[1] == tag:
            self._can_replace = False
            self.put(key, data)
            return True
        # The answer to an earlier try may have been lost.
        return found[0] == bytes(data)

    def size(self, key: str) -> int:
        """Return an object's size in bytes. ObjectMissingError if there is none."""
        with self._explained("read the size of", key):
            path = self._path_to_read(key)
            return self._backend().size(path)

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        try:
            self.size(key)
        except ObjectMissingError:
            return False
        return True

    def remove_leftovers(self, folder: str, *more: str) -> None:
        """Remove what killed writers left below folders that nobody writes to any more."""
        with self._explained("clean up", folder):
            self._backend().remove_leftovers([self._path(folder), *map(self._path, more)])

    def require_exclusive_create(self) -> None:
        """Raise StoreError unless this store keeps the promise of `create`: see `create_probe`."""
        from cluster.create_probe import require_exclusive_create

        require_exclusive_create(self)

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self.root.rstrip('/')}/{key}"

    def _path_to_read(self, key: str) -> str:
        _check_inside(key)
        return f"{self.root.rstrip('/')}/{key}"

    def _backend(self) -> _Backend:
        # fsspec's event loop does not survive a fork: every process makes a connection of its own.
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = os.getpid(), self._connect()
        return self._connection[1]

    def _of_s3(self) -> S3Objects:
        from cluster.s3_objects import S3Objects

        backend = self._backend()
        assert isinstance(backend, S3Objects)
        return backend

    def _connect(self) -> _Backend:
        if self.protocol == "file":
            return LocalFiles()
        if self.protocol == "s3":
            from cluster.s3_objects import S3Objects

            return S3Objects(self._patience)
        try:
            return RemoteObjects(self.protocol, self._patience)
        except ImportError as error:
            raise StoreError(
                f"cannot reach {self.shown}: {self.protocol}:// needs a package that is not installed ({error}). "
                "Install it, or use a folder or s3://"
            ) from error
        except (TypeError, ValueError) as error:  # a file system that needs more than its protocol, such as ftp://
            raise StoreError(
                f"cannot reach {self.shown}: {self.protocol}:// is not supported ({error}); use a folder or s3://"
            ) from error

    @contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except self._backend().errors as error:
            what = f"cannot {action} {key or 'the keys'!r} in {self.shown}"
            explained = explain(error, what, self._backend().endpoint)
            explained.is_permanent = not (self._patience.has_answered and patience.is_transient(error))
            raise explained from error


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
    shown = without_credentials(uri)
    if not separator:
        protocol, rest = "file", uri
    if protocol not in fsspec.available_protocols():
        raise ValueError(f"URI {shown!r}: found {protocol}://, expected a folder, file://, s3:// or what fsspec knows")
    if protocol in _WEB:
        raise ValueError(
            f"URI {shown!r}: found a web server, which cannot be listed; expected a folder, file://, s3:// or another "
            "object store of fsspec (gs://, az://). Copy the files to one of these, or name the bucket by its s3:// URI"
        )
    if not (rest if protocol == "file" else rest.strip("/")):
        raise ValueError(f"URI {shown!r}: found no {'bucket' if protocol == 's3' else 'folder'} in it")
    if protocol == "file":
        return protocol, os.path.abspath(os.path.expanduser(rest))
    return protocol, "/" + rest.strip("/") if protocol == "memory" else rest.rstrip("/")
