"""When the parts of a step ran on a rank, for pictures of what hides behind what."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A part of a step: its name, and its start and end in seconds of this machine's monotonic clock."""

    name: str
    start_s: float
    stop_s: float


class Timeline:
    """Takes down spans of the host's time into a list; into nothing where there is none."""

    def __init__(self, spans: list[Span] | None) -> None:
        self._spans = spans

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Take down the time inside."""
        if self._spans is None:
            yield
            return
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._spans.append(Span(name, start_s, time.monotonic()))
