"""Hand-written stand-ins for the tests of checkpoints: a worker group of threads, and a store that fails on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.store import Store

TIMEOUT_S = 30


@dataclass
class Meeting:
    """Where the ranks of one group exchange objects."""

    world_size: int
    slots: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [None] * self.world_size
        self.barrier = threading.Barrier(self.world_size, timeout=TIMEOUT_S)


@dataclass
class ThreadWorker:
    """A rank that lives in a thread. A group that hangs ends in a BrokenBarrierError."""

    rank: int = 0
    world_size: int = 1
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_gather_object(self, obj: Any) -> list[Any]:
        self.meeting.slots[self.rank] = json.dumps(obj)
        self.meeting.barrier.wait()
        gathered = [json.loads(text) for text in self.meeting.slots]
        self.meeting.barrier.wait()
        return gathered


def run_group(world_size: int, function: Callable[[ThreadWorker], Any]) -> list[Any]:
    """Run function(worker) on every rank; return the results, or the exceptions, by rank."""
    meeting = Meeting(world_size)
    outcomes: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = function(ThreadWorker(rank, world_size, meeting))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
        assert not thread.is_alive(), "a rank hangs"
    return outcomes


class Killed(BaseException):
    """The process ends here; not an Exception, so that nothing can handle it."""


class FaultyStore(Store):
    """A store whose process is killed right before operation number `kill_at`, and so right after the one before.

    With an `error`, that operation raises it instead and the later ones work. `log` has every operation.
    """

    def __init__(self, uri: str, kill_at: int | None = None, error: Exception | None = None):
        super().__init__(uri)
        self.kill_at, self.error = kill_at, error
        self.log: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def _do(self, name: str, key: str, *args: Any) -> Any:
        with self._lock:
            number = len(self.log)
            self.log.append((name, key))
        if self.kill_at is not None and number >= self.kill_at:
            if self.error is None:
                raise Killed
            if number == self.kill_at:
                raise self.error
        return getattr(Store, name)(self, key, *args)

    def put(self, key, *parts):
        self._do("put", key, *parts)

    def create(self, key, data):
        return self._do("create", key, data)

    def get(self, key, start=None, stop=None):
        return self._do("get", key, start, stop)

    def list(self, prefix=""):
        return self._do("list", prefix)

    def delete(self, key):
        self._do("delete", key)

    def size(self, key):
        return self._do("size", key)

    def remove_leftovers(self, folder):
        self._do("remove_leftovers", folder)
