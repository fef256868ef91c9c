"""Threads whose calls mostly wait, for a disk or for a network: whoever closes them need not wait as well."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class IoThreads:
    """Up to `num_threads` threads, started as they are needed.

    A read from a storage that is away takes minutes. The threads of `concurrent.futures` hold up `shutdown` and the end
    of the process until then; these end by themselves after the call that they are in, or with the process.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads, self._name = num_threads, name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._num_started, self._is_closed = 0, False

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Call function(*arguments) in a thread. Raises RuntimeError after `close`."""
        future: Future[Result] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"the threads {self._name} are closed")
            self._calls.put((future, lambda: function(*arguments)))
            if not self._idle.acquire(blocking=False) and self._num_started < self._num_threads:
                self._num_started += 1
                name = f"{self._name}_{self._num_started}"
                threading.Thread(target=_work, args=(self._calls, self._idle), name=name, daemon=True).start()
        return future

    def close(self) -> None:
        """Cancel the calls that have not begun, and return at once."""
        with self._lock:
            self._is_closed = True
            while True:
                try:
                    call = self._calls.get_nowait()
                except Empty:
                    break
                if call is not None and call[0].cancel():
                    call[0].set_running_or_notify_cancel()
            self._calls.put(None)


def _work(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], idle: threading.Semaphore) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        # Not held while waiting: an image, or whatever the call was given.
        del call, future, function
        idle.release()
    calls.put(None)
