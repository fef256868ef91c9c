"""One read for several readers of the same image."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future


class SharedReads:
    """Calling it with a row returns what `read` returns for it; calls near each other in time share one read.

    Global and local views of an image are read beside each other; from a far place that would be two downloads.
    """

    is_remote = True

    def __init__(self, read: Callable[[int], bytes], num_kept: int) -> None:
        """num_kept: how many images are kept for the others that want them."""
        self._read, self._num_kept = read, num_kept
        self._kept: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def repaired(self, row: int, encoded: bytes) -> bytes | None:
        """As the reader's own; other calls for the row get what is right as well."""
        right = getattr(self._read, "repaired", lambda row, encoded: None)(row, encoded)
        if right is not None:
            with self._lock:
                future = self._kept[row] = Future()
            future.set_result(right)
        return right

    def __call__(self, row: int) -> bytes:
        """Return the encoded image. Raises what `read` raises; the next call tries again."""
        with self._lock:
            future = self._kept.get(row)
            is_mine = future is None
            if future is None:
                future = self._kept[row] = Future()
                if len(self._kept) > self._num_kept:
                    self._kept.popitem(last=False)
        if is_mine:
            try:
                future.set_result(self._read(row))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(row, None)
                future.set_exception(error)
        return future.result()
