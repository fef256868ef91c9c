"""Reading tar files of others: a length is compared with what is there before anything is read or skipped for it.

Python's tarfile believes them: a member of a negative size is read for ever, and an extended header of any size is read
into memory.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any

from dataloading.numerals import whole_number

TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, KeyError, RecursionError)
"""What tarfile raises for files that are no whole tar."""
_MAX_HEADER_BYTES = 1 << 20
"""Long names and PAX headers are smaller by far."""
_SIZE = slice(124, 136)
"""Place of a member's size in its header."""
_WITHOUT_DATA = {
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
}
_HEADERS = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}


def open_tar(num_bytes: int, *, path: Any = None, file: IO[bytes] | None = None, mode: str = "r:") -> tarfile.TarFile:
    """Return an open tar file of `num_bytes` bytes, whose headers are checked as they are read."""
    return tarfile.TarFile.open(path, fileobj=file, mode=mode, tarinfo=_checked_headers(num_bytes))  # pyright: ignore


def members_of(tar: tarfile.TarFile, num_bytes: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar that `open_tar` returned. Raises what is in `TAR_ERRORS`, and names the member."""
    for member in tar:
        if "size" in member.pax_headers:
            whole_number(member.pax_headers["size"])
        if member.isreg():
            if member.issparse():
                raise tarfile.ReadError(f"member {member.name!r} is a sparse file, whose bytes are not as they were")
            _check(member.name, member.size, num_bytes - member.offset_data)
        yield member


def _check(name: str, size: int, left: int) -> None:
    if not 0 <= size <= left:
        raise tarfile.ReadError(f"member {name!r} of {size:,} bytes, where {left:,} are left")


def _checked_headers(num_bytes: int) -> type[tarfile.TarInfo]:
    class Header(tarfile.TarInfo):
        """A header whose size was compared with the file's before tarfile follows it."""

        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
            if b"_" in buf[_SIZE] and not buf[_SIZE.start] & 0x80:
                raise tarfile.ReadError(f"a member of size {bytes(buf[_SIZE])!r}")
            return super().frombuf(buf, encoding, errors)

        def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile says that it may be overridden
            if self.type not in _WITHOUT_DATA:
                left = num_bytes - tar.fileobj.tell()  # pyright: ignore[reportOptionalMemberAccess]
                _check(self.name, self.size, min(left, _MAX_HEADER_BYTES) if self.type in _HEADERS else left)
            return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue]

    return Header
