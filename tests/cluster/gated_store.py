"""Processes that stop before each of their store operations, so that a test decides what happens in which order.

A `Call` runs a function in a thread of its own that only moves when `step` lets it: one store operation at a time, with
nothing else running meanwhile. Any number of calls can so be interleaved, at the one granularity that other processes
can see, and the same choices give the same run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

from checkpoint_fakes import Killed
from intercepted_store import InterceptedStore

from cluster.store import StoreError

TIMEOUT_S = 30
_this_thread = threading.local()


class Fate(Enum):
    """What becomes of a store operation, and of the process that asked for it."""

    DONE = "done"
    KILLED_BEFORE = "the process is killed before the operation is applied"
    KILLED_AFTER = "the process is killed after it was applied, and never sees the answer"
    FAILED_BEFORE = "the operation fails, and passes if it is tried again"
    FAILED_AFTER = "the operation is applied and its answer lost"
    REFUSED = "the operation fails, and will whenever it is tried again"


KILLS = (Fate.KILLED_BEFORE, Fate.KILLED_AFTER)


class GatedStore(InterceptedStore):
    """A store whose operations, in the thread of a `Call`, wait for its `step`. Others pass.

    observe: told (name, key, data) right before an operation that changes something is applied.
    """

    def __init__(self, uri: str, observe: Callable[[str, str, bytes], None] | None = None) -> None:
        super().__init__(uri)
        self._observe = observe

    def intercept(self, name: str, key: str, *args: Any) -> Any:
        def apply() -> Any:
            if self._observe is not None and name in ("put", "create", "delete"):
                self._observe(name, key, b"".join(args))
            return self.do(name, key, *args)

        call: Call | None = getattr(_this_thread, "call", None)
        return apply() if call is None else call.pass_gate((name, key), apply)


class Call:
    """A call in a process of its own. It runs at once up to its first store operation.

    next: the operation, (name, key), that it is about to do; None when it has ended. result, error: how it ended;
    neither if it was killed. num_steps: operations that were let pass.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.next: tuple[str, str] | None = None
        self.result: Any = None
        self.error: Exception | None = None
        self.is_killed = False
        self.num_steps = 0
        self._function = function
        self._fate = Fate.DONE
        self._open, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()
        self._await()

    @property
    def has_ended(self) -> bool:
        return self.next is None

    def step(self, fate: Fate = Fate.DONE) -> None:
        """Let the call do its next operation and go on to the one after it, or to its end."""
        assert self.next is not None, "the call has ended"
        self._fate = fate
        self.num_steps += 1
        self._open.release()
        self._await()

    def finish(self) -> Any:
        """Let the call run to its end; return its result or raise its error."""
        while not self.has_ended:
            self.step()
        if self.error is not None:
            raise self.error
        return self.result

    def kill(self) -> None:
        """End it where it stands."""
        if not self.has_ended:
            self.step(Fate.KILLED_BEFORE)

    def pass_gate(self, operation: tuple[str, str], apply: Callable[[], Any]) -> Any:
        """Called in the call's thread."""
        if self.is_killed:
            raise Killed
        self.next = operation
        self._stopped.release()
        self._open.acquire()
        fate = self._fate
        if fate in KILLS:
            self.is_killed = True
        result = apply() if fate in (Fate.DONE, Fate.KILLED_AFTER, Fate.FAILED_AFTER) else None
        if self.is_killed:
            raise Killed
        if fate is Fate.REFUSED:
            raise StoreError(f"cannot {operation}: no permission")
        if fate is not Fate.DONE:
            raise StoreError(f"cannot {operation}: reset") from ConnectionResetError("reset")
        return result

    def _await(self) -> None:
        assert self._stopped.acquire(timeout=TIMEOUT_S), f"the call hangs, last at {self.next}"

    def _run(self) -> None:
        _this_thread.call = self
        try:
            self.result = self._function()
        except Killed:
            self.is_killed = True
        except Exception as error:
            self.error = error
        self.next = None
        self._stopped.release()
