"""Hand-written stand-ins for the tests of checkpoints: a worker group, an in-line coordinator, stores that fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from intercepted_store import InterceptedStore

from cluster.coordination import answered, packed, unpacked
from cluster.coordinator import Coordinator
from cluster.retention import Retention
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


class InlineCoordination:
    """A coordinator that works inside the calls: no threads, no heartbeat, so that operations come in one order."""

    def __init__(self, store: Store, retention: Retention | None = None) -> None:
        self._store, self._retention = store, retention
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Forget everything, as a coordinator does that was killed and started again."""
        self.coordinator = Coordinator(self._store, retention=self._retention)

    def call(self, method: str, **arguments: Any) -> Any:
        with self._lock:
            methods = {
                "begin_attempt": self.coordinator.begin_attempt,
                "start_attempt": self.coordinator.start_attempt,
                "acknowledge": self._acknowledge,
            }
            return unpacked(answered(packed(method, arguments), methods))

    def _acknowledge(self, *, attempt: int, step: int, number: int, **rest: Any) -> dict[str, Any]:
        self.coordinator.acknowledge(attempt, step, number, **rest)
        while self.coordinator.work():
            pass
        while self.coordinator.remove_old():
            pass
        return self.coordinator.state_of(attempt, step, number)


class Killed(BaseException):
    """The process ends here; not an Exception, so that nothing can handle it."""


class FaultyStore(InterceptedStore):
    """A store whose process is killed right before operation number `kill_at`, and so right after the one before.

    With an `error`, that operation raises it instead and the later ones work. `log` has every operation.
    """

    def __init__(self, uri: str, kill_at: int | None = None, error: Exception | None = None):
        super().__init__(uri)
        self.kill_at, self.error = kill_at, error
        self.log: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def intercept(self, name: str, key: str, *args: Any) -> Any:
        with self._lock:
            number = len(self.log)
            self.log.append((name, key))
        if self.kill_at is not None and number >= self.kill_at:
            if self.error is None:
                raise Killed
            if number == self.kill_at:
                raise self.error
        return self.do(name, key, *args)


class SlowStore(Store):
    """A store that takes its time over every object that it writes."""

    def __init__(self, uri: str, delay_s: float) -> None:
        super().__init__(uri)
        self.delay_s = delay_s

    def put(self, key, *parts):
        time.sleep(self.delay_s)
        super().put(key, *parts)
