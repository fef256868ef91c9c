"""Several buffers read as one file, without a copy of them."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class JoinedViews(io.RawIOBase):
    """The concatenation of views of bytes as a readable, seekable file with a length."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view.cast("B") for view in views if view.nbytes]
        self._ends = list(accumulate(view.nbytes for view in self._views))
        self._position = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def part(self, start: int, stop: int) -> JoinedViews:
        """Return bytes [start, stop) as a file of its own that shares the memory of this one."""
        found, begin = [], 0
        for view, end in zip(self._views, self._ends, strict=True):
            if begin < stop and end > start:
                found.append(view[max(start - begin, 0) : stop - begin])
            begin = end
        return JoinedViews(found)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self)}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill as much of `buffer` as there is: short only at the end, as the makers of checksums expect."""
        target, done = memoryview(buffer).cast("B"), 0
        while done < len(target) and self._position < len(self):
            number = bisect_right(self._ends, self._position)
            view = self._views[number]
            start = self._position - (self._ends[number] - view.nbytes)
            size = min(view.nbytes - start, len(target) - done)
            target[done : done + size] = view[start : start + size]
            done += size
            self._position += size
        return done
