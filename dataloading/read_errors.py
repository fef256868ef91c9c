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
