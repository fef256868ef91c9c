"""Fetches CIFAR's archives: one of the processes that ask at once, into a folder that has its name when it is whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

from dataloading.index import DatasetError

if TYPE_CHECKING:
    from dataloading.cifar import CifarKind

_WORK = ".download-"
_ANSWER_S = 60.0
"""How long the server may be silent."""
_OTHER_S = 1800.0
"""How long another process may take: 170 MB at 100 kB/s."""
_POLL_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What a file system without file locks says, or one that locks nothing but files open for writing."""
_FAILURES = (OSError, HTTPException, tarfile.TarError, EOFError, ValueError)


def fetch(kind: CifarKind, root: Path, advice: str) -> None:
    """Have the images in `root`, if it is missing or empty; whatever else is there, it is not ours to add to.

    advice: what to do without a network. Raises DatasetError where it fails.
    """
    if root.exists() and (not root.is_dir() or _visible(root)):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root) as is_alone:
            if not _visible(root):  # else another process fetched it meanwhile
                _download(kind, root, is_alone=is_alone)
    except _FAILURES as error:
        with contextlib.suppress(OSError):
            root.rmdir()  # if it is empty
        raise DatasetError(f"cannot download {kind.url} ({error}). Without a network: {advice}") from error


def _visible(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if not name.startswith(".")]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder, or wait until another process has filled it; yields whether the lock is held.

    On a file system without locks each process downloads for itself, and the first one's folder stays.
    """
    descriptor, deadline = os.open(folder, os.O_RDONLY | os.O_CLOEXEC), time.monotonic() + _OTHER_S
    try:
        is_alone = None
        while is_alone is None and not _visible(folder):
            is_alone = _try_lock(descriptor)
            if is_alone is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has been at it in {folder} for {_OTHER_S:.0f} s; end it")
                time.sleep(_POLL_S)
        yield bool(is_alone)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Return True with the lock, None where another process has it, False where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _download(kind: CifarKind, root: Path, *, is_alone: bool) -> None:
    for left in root.glob(f"{_WORK}*") if is_alone else ():
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    # Hidden until it is whole: a download that was killed leaves nothing that looks like the data set.
    work = Path(tempfile.mkdtemp(prefix=_WORK, dir=root))
    try:
        archive = work / "archive"
        found = _save(kind.url, archive)
        if found != kind.md5:
            raise ValueError(f"found an archive with md5 {found}, expected {kind.md5}")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        for path in (work / kind.folder).iterdir():
            _sync(path)
        try:
            (work / kind.folder).rename(root / kind.folder)
        except OSError:
            if is_alone or not (root / kind.folder).is_dir():
                raise
        _sync(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save(url: str, path: Path) -> str:
    """Save what a server has at a URL; return its md5 (hex)."""
    md5 = hashlib.md5(usedforsecurity=False)
    with urlopen(url, timeout=_ANSWER_S) as answer, open(path, "wb") as file:
        while piece := answer.read(1 << 20):
            md5.update(piece)
            file.write(piece)
    return md5.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
