"""How workers talk to the coordinator: calls with JSON both ways, whatever carries them.

`CoordinatorService` keeps a coordinator at work in threads. It is called directly in one process, through a socket from
local worker processes (`local_coordinator`), or as an actor of Ray (`ray_coordinator`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from cluster import patience
from cluster.attempts import SupersededError
from cluster.coordinator import Coordinator
from cluster.failures import may_pass
from cluster.lease import BEAT_S, Holder, Lease, RunHeldError
from cluster.manifest import ManifestError, NewerFormatError
from cluster.retention import Retention
from cluster.store import ObjectMissingError, Store, StoreError
from cluster.stored_object import CheckpointError

IDLE_S = 1.0
CLOSE_TIMEOUT_S, REMOVAL_TIMEOUT_S = 10.0, 4.0
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(CheckpointError, SupersededError, RunHeldError, StoreError, ObjectMissingError),
        *(ManifestError, NewerFormatError, ValueError),
    )
}


class CoordinatorGoneError(CheckpointError):
    """The coordinator does not answer."""


class Coordination(Protocol):
    """A way to call the coordinator."""

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of `CoordinatorService` and return its result, as JSON has it.

        Raises what the method raises, and CoordinatorGoneError where nobody answers; a call may be repeated.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CoordinatorSpec:
    """What a coordinator is started with, here or in another process.

    reached: what `patience.reached` returned where it was made.
    """

    uri: str
    retention: Retention = field(default_factory=Retention)
    holder: Holder = field(default_factory=Holder.of_this_process)
    reached: tuple[str, ...] = field(default_factory=patience.reached)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CoordinatorSpec:
        document = json.loads(text)
        return cls(
            uri=document["uri"],
            retention=Retention(**document["retention"]),
            holder=Holder(**document["holder"]),
            reached=tuple(document["reached"]),
        )

    def start(self) -> CoordinatorService:
        """Return a coordinator at work in this process."""
        store = Store(self.uri)
        return CoordinatorService(store, Coordinator(store, retention=self.retention), Lease(store, self.holder))


class CoordinatorService:
    """A coordinator at work: a thread commits what is complete, one removes what that made superfluous, one renews the
    heartbeat. Close it.
    """

    def __init__(self, store: Store, coordinator: Coordinator, lease: Lease) -> None:
        self._store, self._coordinator, self._lease = store, coordinator, lease
        self._closing = threading.Event()
        self._arrived, self._committed, self._giving_up = threading.Event(), threading.Event(), threading.Event()
        self._has_committed_last = False
        # Of folders and of memory it is known.
        self._is_probed = store.protocol in ("file", "memory")
        self._wishing = threading.Lock()
        self._wanted_saves = 0
        self._left_behind = 0
        """The attempt of which it is known that a newer one was begun elsewhere."""
        self._threads = [
            threading.Thread(target=self._commit, name="coordinator-commit", daemon=True),
            threading.Thread(target=self._remove, name="coordinator-remove", daemon=True),
            threading.Thread(target=self._beat, name="coordinator-beat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def call(self, method: str, **arguments: Any) -> Any:
        """Call one of the methods below by its name; arguments and result pass through JSON."""
        return unpacked(self.answer(packed(method, arguments)))

    def answer(self, request: str) -> str:
        """Answer a request that `packed` made, with what `unpacked` reads. Safe in threads; raises nothing."""
        return answered(request, self._methods())

    def close(self) -> None:
        """Stop working and release the run. A store that does not answer is not waited for, nor a long removal: what
        it leaves the next one finds.
        """
        self._closing.set()
        self._arrived.set()
        committing, removing, beating = self._threads
        committing.join(CLOSE_TIMEOUT_S)
        self._has_committed_last = True
        self._committed.set()
        removing.join(REMOVAL_TIMEOUT_S)
        self._giving_up.set()
        beating.join(CLOSE_TIMEOUT_S)
        # In a thread: requests are repeated for minutes.
        releasing = threading.Thread(target=self._release, name="coordinator-release", daemon=True)
        releasing.start()
        releasing.join(CLOSE_TIMEOUT_S)

    def begin_attempt(self) -> dict[str, Any]:
        """Take the run's lease, then `Coordinator.begin_attempt`. StoreError where a create can overwrite."""
        if not self._is_probed:
            self._store.require_exclusive_create()
            self._is_probed = True
        self._lease.take()
        begun = self._coordinator.begin_attempt()
        self._lease.beat(begun["attempt"])
        return begun

    def acknowledge(self, **arguments: Any) -> dict[str, Any]:
        """`Coordinator.acknowledge`."""
        state = self._coordinator.acknowledge(**arguments)
        self._arrived.set()
        return state

    def want_save(self) -> int:
        """Ask for a checkpoint as soon as possible, before a machine goes or the group is resized; return the number of
        the wish, see `wishes`.
        """
        # From the clock, so that a coordinator that was started again does not use numbers twice.
        with self._wishing:
            self._wanted_saves = max(self._wanted_saves + 1, time.time_ns() // 1_000_000)
            return self._wanted_saves

    def wishes(self) -> dict[str, Any]:
        """Return {"saves": the number of the last wish for a checkpoint, "served": of the last one that is fulfilled,
        "superseded": whether a newer attempt goes on}.
        """
        return {
            "saves": self._wanted_saves,
            "served": self._coordinator.last_wish,
            "superseded": 0 < self._left_behind == self._coordinator.attempt,
        }

    def _methods(self) -> dict[str, Callable[..., Any]]:
        return {
            "begin_attempt": self.begin_attempt,
            "start_attempt": self._coordinator.start_attempt,
            "acknowledge": self.acknowledge,
            "state_of": self._coordinator.state_of,
            "want_save": self.want_save,
            "wishes": self.wishes,
        }

    def _release(self) -> None:
        with suppress(OSError):  # others find that the heartbeat has stopped
            self._lease.release()

    def _commit(self) -> None:
        while not self._closing.is_set():
            self._arrived.wait(IDLE_S)
            self._arrived.clear()
            while not self._closing.is_set() and self._coordinator.work():
                self._committed.set()

    def _remove(self) -> None:
        while not self._giving_up.is_set():
            self._committed.wait()
            self._committed.clear()
            is_last = self._has_committed_last
            while self._coordinator.remove_old(self._giving_up.is_set):
                pass
            if is_last:
                return

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                attempt = self._coordinator.attempt
                self._lease.beat(attempt)
                # Not what a heartbeat says: one that was long on its way would end the only one who trains.
                if self._coordinator.is_superseded():
                    self._left_behind = attempt
            except OSError:
                continue  # the store does not answer; saves will say so


def wish_for_save(coordination: Coordination) -> None:
    """Ask a run's coordinator for a checkpoint as soon as possible."""
    with suppress(OSError):  # the coordinator is gone, and with it the run
        coordination.call("want_save")


def packed(method: str, arguments: dict[str, Any]) -> str:
    """Return a call as text."""
    return json.dumps({"method": method, "arguments": arguments})


def answered(request: str, methods: dict[str, Callable[..., Any]]) -> str:
    """Return the answer to a call as text."""
    try:
        document = json.loads(request)
        return json.dumps({"result": methods[document["method"]](**document["arguments"])})
    except Exception as error:
        kind = type(error).__name__
        text = str(error) if kind in _ERRORS else f"the coordinator failed: {error!r}"
        return json.dumps({"error": text, "kind": kind, "may_pass": may_pass(error)})


def unpacked(answer: str) -> Any:
    """Return the result in an answer, or raise the error in it."""
    document = json.loads(answer)
    if "error" in document:
        error = _ERRORS.get(document["kind"], CheckpointError)(document["error"])
        if document.get("may_pass") and isinstance(error, CheckpointError | StoreError):
            error.is_permanent = False
        raise error
    return document["result"]
