"""What a failing storage says to a person: what, where, why and what to do. No secret is ever part of it."""

from __future__ import annotations

import errno

from cluster import s3_errors
from cluster.credentials import without_credentials

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


class StoreError(OSError):
    """A store cannot do what was asked: the text says what, where, why and what to do.

    is_permanent: False where it answered before and fails in a way that passes, so that nobody made a mistake.
    """

    is_permanent = True


class ObjectMissingError(StoreError, FileNotFoundError):
    """There is no object under the key."""


def explain(error: Exception, what: str, endpoint: str | None = None) -> StoreError:
    """Return the error to raise for a backend's. `what` is what cannot be done, `endpoint` the address of an S3."""
    kind, text = _explained(error, what, endpoint)
    return kind(without_credentials(text))


def _explained(error: Exception, what: str, endpoint: str | None) -> tuple[type[StoreError], str]:
    if endpoint is not None and (advice := s3_errors.advise(error, endpoint)) is not None:
        return StoreError, f"{what}: {advice} ({_text(error)})"
    if isinstance(error, FileNotFoundError):
        if what.startswith(("cannot write", "cannot create")):
            return StoreError, f"{what}: the bucket or folder is not there; create it, or choose another URI ({error})"
        return ObjectMissingError, f"{what}: it is not there"
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, PermissionError) and number not in _ADVICE:
        number = errno.EACCES
    advice = f": {_ADVICE[number]}" if number in _ADVICE and endpoint is None else ""
    return StoreError, f"{what}{advice} ({_text(error)})"


def _text(error: Exception) -> str:
    code = s3_errors.code_of(error)
    return f"{type(error).__name__}: {error}" if code is None else f"{code}: {error}"
