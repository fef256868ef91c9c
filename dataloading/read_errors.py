"""Reading that fails is no damage: only bytes that were read whole can be those of a damaged image.

A storage that is gone, a limit of open files or a failing disk ends what is being done, with the system's reason and
advice; no image is recorded as damaged for it. In this package an OSError therefore always means that nothing is known
of an image, and a ValueError that its bytes are known to be wrong.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_ADVICE = {
    errno.ENOENT: "it was there when the images were listed; put it back, or list the images again for a new run",
    errno.EMFILE: "raise this limit of the process (ulimit -n)",
    errno.ENFILE: "raise this limit of the machine (fs.file-max), or end other programs",
    errno.EIO: "the disk, or the machine that it belongs to, fails; check its health, or copy the images elsewhere",
    errno.ESTALE: "the file server forgot it; mount the folder anew",
    errno.ENOTCONN: "what serves this folder is gone; mount it anew",
    errno.ENODEV: "what serves this folder is gone; mount it anew",
}


TOO_LARGE = "too large"
"""How the reason begins for images that may be whole, but have more pixels than are decoded."""
_LARGE_PIXELS = 1 << 24
"""An image that claims more pixels than this may be to blame where memory is short: 64 MB for each copy of it."""


class OutOfMemory(OSError):
    """The process has no memory to decode an image, which says nothing of the image."""


def raise_if_of_memory(error: Exception, what: str) -> None:
    """Raise OutOfMemory where a decoder failed for want of memory. what: the image or the file, for the message."""
    if isinstance(error, OutOfMemory):
        raise error
    if isinstance(error, MemoryError):
        raise _out_of_memory(what) from error


def _out_of_memory(what: str) -> OutOfMemory:
    text = (
        f"{os.strerror(errno.ENOMEM)} to decode {what}; it is no damage of it. Raise the limit of the process "
        "or of its container (ulimit -v, memory of the job), end other programs, or use fewer workers on the machine"
    )
    return OutOfMemory(errno.ENOMEM, text)


def too_large_for_memory(height: int, width: int) -> str:
    """Return why an image is left out that a process had no memory for.

    Raises OutOfMemory where the image claims no more than others do: the process is to blame.
    """
    if height * width <= _LARGE_PIXELS:
        raise _out_of_memory(f"an image of {width} x {height} pixels")
    return f"{TOO_LARGE}: {width} x {height} pixels need more memory than there is; make it smaller"


@contextmanager
def advised(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file, and what to do, in an OSError of the system; its type stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        text = f"{os.strerror(error.errno)}; {_ADVICE[error.errno]}"
        raise OSError(error.errno, text, os.fspath(path)) from error


class WatchedFile:
    """An open file that remembers whether reading it failed, whatever a decoder makes of that."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """Return bytes as the file does. Raises its OSError."""
        try:
            return self._file.read(size)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
