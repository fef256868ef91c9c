"""What the data path needs of storage and of a cluster: handed in, so that retries, deadlines and Ray exist once.

`cluster.store.Store` is an `Objects`; `cluster.parallel` and `cluster.ray_map` have the maps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dataloading.cache import ShardCache


class Objects(Protocol):
    """The objects below one URI. Safe in threads, picklable; what fails raises OSError after retries."""

    @property
    def uri(self) -> str: ...

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return an object's bytes [start, stop). Raises FileNotFoundError where there is none."""
        ...

    def put(self, key: str, *parts: bytes | bytearray | memoryview) -> None:
        """Write the concatenation of the parts as one object, whole or not at all."""
        ...

    def list_sizes(self, prefix: str = "") -> list[tuple[str, int]]:
        """Return (key, bytes) of the objects whose key begins with `prefix`, sorted by key."""
        ...

    def versions(self) -> dict[str, str]:
        """Return, by key, what tells an object apart from one that takes its place, as far as the storage knows it."""
        ...

    def size(self, key: str) -> int: ...

    def delete(self, key: str) -> None: ...

    def remove_leftovers(self, folder: str) -> None:
        """Remove what killed writers left below a folder, and the folder itself if it is empty."""
        ...


class ParallelMap(Protocol):
    """Calls a function of the top level of a module for many items, in other processes."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield function(item) for all items, as they are done. An exception ends the map."""
        ...


@dataclass(frozen=True)
class Storage:
    """How remote images are reached."""

    open: Callable[[str], Objects]
    """Opens a URI."""
    cache: ShardCache | None = None
    """Keeps shards on this machine; None: every image is read from afar each time."""


def is_remote(root: str | None) -> bool:
    """Whether a data root is a URI of another place than this machine's file system."""
    return root is not None and "://" in root and not root.startswith("file://")


def local_path(root: str) -> str:
    """Return a local data root without its file://, with ~ as the home folder."""
    return os.path.expanduser(root.removeprefix("file://"))
