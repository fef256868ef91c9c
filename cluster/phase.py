"""What a worker is doing at the moment, for whoever finds it dead: a few bytes in a file, if one is asked for.

The environment variable INSTDISC_PHASE_DIR names a folder, in which every process keeps a file of its own, named after
its number. Two things can go on at once: training, and a save in the background.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

VARIABLE = "INSTDISC_PHASE_DIR"
_WIDTH = 16


class Phase(StrEnum):
    """Parts of a worker's life that a crash can hit."""

    START = "start"
    RESTORE = "restore"
    STEP = "step"
    SNAPSHOT = "snapshot"
    UPLOAD = "upload"
    MANIFEST = "manifest"


_BACKGROUND = (Phase.UPLOAD, Phase.MANIFEST)
_current: dict[tuple[int, int], Phase] = {}
"""By (process, slot): a fork has its parent's memory, but not its phases."""
_files: dict[int, int] = {}


def enter(new: Phase, step: int) -> None:
    """Say what this process does from now on, and how many steps it has made."""
    if VARIABLE in os.environ:
        _write(new in _BACKGROUND, new)
        os.pwrite(_files[os.getpid()], f"{step:{_WIDTH}d}".encode(), 2 * _WIDTH)


@contextmanager
def phase(new: Phase) -> Iterator[None]:
    """Say what this process does inside; afterwards it does again what it did before."""
    if VARIABLE not in os.environ:
        yield
        return
    slot = new in _BACKGROUND
    before = _current.get((os.getpid(), slot))
    _write(slot, new)
    try:
        yield
    finally:
        _write(slot, before)


def read_phase(folder: Path, pid: int) -> tuple[Phase, int] | None:
    """Return what a process was doing last, the save in the background if there was one, and how many steps it had
    made (-1: none yet). None if it said nothing.
    """
    try:
        text = (folder / str(pid)).read_text().ljust(3 * _WIDTH)
    except OSError:
        return None
    foreground, background, step = (text[at : at + _WIDTH].strip("\0 ") for at in range(0, 3 * _WIDTH, _WIDTH))
    return Phase(background or foreground or Phase.START), int(step or -1)


def _write(slot: bool, new: Phase | None) -> None:
    pid = os.getpid()
    if new is None:
        _current.pop((pid, slot), None)
    else:
        _current[pid, slot] = new
    if pid not in _files:
        _files[pid] = os.open(Path(os.environ[VARIABLE]) / str(pid), os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(_files[pid], (new or "").ljust(_WIDTH).encode(), _WIDTH * slot)
