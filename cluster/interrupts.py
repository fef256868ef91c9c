"""Ctrl-C and SIGTERM while a run is on: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context in which SIGINT or SIGTERM sets `requested` the first time and raises KeyboardInterrupt the second time.

    The handlers that were there before come back afterwards. Outside the main thread Python installs no handlers, and
    this does nothing.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        self.take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: the earlier handler was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # pyright: ignore[reportArgumentType]

    def take_over(self) -> None:
        """Handle the signals from now on; again after somebody else (Ray) installed handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous.setdefault(number, signal.signal(number, self._handle))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
