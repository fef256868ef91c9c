"""Ctrl-C, SIGTERM and the other signals with which a run is asked to end or to save; the same in every phase.

A command says at once that it stops (`said_at_once`), wherever it is. While there is something to save, the first
signal asks for an orderly end (`Interrupts`); otherwise it ends the command there and then. The second one ends it in
any case.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType, TracebackType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING = signal.SIGUSR1
"""Save a checkpoint and go on (what Slurm's --signal sends ahead of the end of a job)."""
NOT_FOR_PARTS = (*ENDING, SAVING)
"""What a terminal, `timeout` or a batch system sends to every process of a group, although only the driver decides."""
INTERRUPTED = 130
GRACE_S = 2.0
"""For a command to clean up after the second signal."""

_depth = 0
_active: list[Interrupts] = []


class Interrupts:
    """Context of a run: what its signals do.

    While `is_orderly` the first of `ENDING` sets `requested`; otherwise, as from the second on, KeyboardInterrupt is
    raised. SIGUSR1 calls `on_save`, in a thread, once there is one. The handlers that were there before come back
    afterwards. Outside the main thread Python installs no handlers, and this does nothing.
    """

    def __init__(self) -> None:
        self.requested = self.is_orderly = False
        self._on_save: Callable[[], None] | None = None
        self._is_save_wanted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if not is_ignored(number):
                    self._previous[number] = signal.signal(number, self._end)
            self._previous[SAVING] = signal.signal(SAVING, self._save)
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        while self._previous:
            number, handler = self._previous.popitem()
            # None: the earlier handler was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # pyright: ignore[reportArgumentType]

    def save_with(self, on_save: Callable[[], None]) -> None:
        """From now on SIGUSR1 calls `on_save`; one that came before is made up for."""
        self._on_save = on_save
        if self._is_save_wanted:
            self._save(SAVING, None)

    def _end(self, signum: int, frame: FrameType | None) -> None:
        was_requested, self.requested = self.requested, True
        if was_requested or not (self.is_orderly or _depth):
            raise KeyboardInterrupt

    def _save(self, signum: int, frame: FrameType | None) -> None:
        self._is_save_wanted = self._on_save is None
        if self._on_save is not None:
            # In a thread: what this one was doing may hold a lock.
            threading.Thread(target=self._on_save, name="save-wish", daemon=True).start()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What is done inside is brought to its end at the first signal: half of it would leave processes behind."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if not _depth and any(interrupts.requested and not interrupts.is_orderly for interrupts in _active):
        raise KeyboardInterrupt


@contextlib.contextmanager
def kept_from_parts(but: Collection[signal.Signals] = ()) -> Iterator[None]:
    """Processes that are started inside get none of the signals that only the driver is to hear, `but` these."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(NOT_FOR_PARTS).difference(but))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_as_part() -> None:
    """Leave it to the driver, in a process that it started, what such a signal means."""
    for number in NOT_FOR_PARTS:
        signal.signal(number, signal.SIG_IGN)


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process wants it to outlive the signal (nohup)."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextlib.contextmanager
def said_at_once() -> Iterator[None]:
    """Context of a command: of the first signal it is said within a moment that it was heard, and `GRACE_S` after the
    second the process ends, be it in the middle of a library that looks at no signals.

    SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, SIGUSR1 does nothing, unless `Interrupts` say otherwise.
    Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()
    before: dict[signal.Signals, object] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if not is_ignored(number):
            before[number] = signal.signal(number, signal.default_int_handler)
    if signal.getsignal(SAVING) is signal.SIG_DFL:
        before[SAVING] = signal.signal(SAVING, lambda signum, frame: None)
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_hear, args=(reading, over), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(earlier)
        os.close(writing)
        thread.join()
        os.close(reading)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # pyright: ignore[reportArgumentType]


def _hear(reading: int, over: threading.Event) -> None:
    heard = 0
    while data := os.read(reading, 64):
        for number in data:
            if number == SAVING and _active:
                _say("a checkpoint is saved soon")
            if number not in ENDING or is_ignored(signal.Signals(number)):
                continue
            heard += 1
            if heard == 1:
                _say("stopping (once more: at once)")
            if heard == 2:
                threading.Thread(target=_end_after, args=(over,), name="end-at-once", daemon=True).start()


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
        print(f"\n{text}", file=sys.stderr, flush=True)


def _end_after(over: threading.Event) -> None:
    if not over.wait(GRACE_S):
        os._exit(INTERRUPTED)
