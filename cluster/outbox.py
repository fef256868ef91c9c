"""A bounded mailbox between a worker, which must not wait, and a pipe or a driver, which may be slow."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator

MAX_PENDING_EVENTS = 256


class Outbox:
    """Events (JSON text) waiting to be taken, oldest first; thread-safe, `put` never waits for the taker.

    Beyond `max_pending` events the oldest one that may be dropped goes: one without `"keep": true`.
    """

    def __init__(self, max_pending: int = MAX_PENDING_EVENTS):
        self._max_pending = max_pending
        self._droppable: deque[tuple[int, str]] = deque()
        self._kept: deque[tuple[int, str]] = deque()
        self._num_put = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, event: str) -> None:
        """Add an event."""
        keep = json.loads(event).get("keep") is True
        with self._changed:
            self._num_put += 1
            (self._kept if keep else self._droppable).append((self._num_put, event))
            if len(self._droppable) > self._max_pending:
                self._droppable.popleft()
            self._changed.notify()

    def close(self) -> None:
        """No more events will come; `drain` ends when it has handed out the last one."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take_all(self) -> list[str]:
        """Take every event that is there now, in the order in which they were put."""
        with self._changed:
            events = [event for _, event in sorted([*self._kept, *self._droppable])]
            self._kept.clear()
            self._droppable.clear()
            return events

    def drain(self) -> Iterator[str]:
        """Take the events one after the other, waiting for each, until the outbox is closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._kept or self._droppable or self._closed)
                first = min((queue for queue in (self._kept, self._droppable) if queue), default=None)
                if first is None:
                    return
                event = first.popleft()[1]
            yield event
