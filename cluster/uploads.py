"""Objects on their way into a store from threads, with bounded memory and a bounded share of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cluster.store import Buffer, Store
from cluster.stored_object import CheckpointError, StoredObject, write_object

MEMORY_BYTES = 128 * 2**20


class Pace:
    """Lets each thread of an upload send for a share of the time and rest for the remainder.

    So whatever the speed of the link, that share of what the threads could send of it is used, and the rest is left to
    training. `hurry` ends the rests: somebody waits for the upload. `give_up` ends the upload: nobody needs it now.
    """

    def __init__(self, share: float = 1.0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"bandwidth share: found {share}, expected more than 0 and at most 1")
        self._share = share
        self._hurried = threading.Event()
        self._given_up = False

    def rest(self, busy_s: float) -> None:
        """Rest after having sent for `busy_s`."""
        if self._share < 1:
            self._hurried.wait(busy_s * (1 - self._share) / self._share)

    def hurry(self) -> None:
        """Send without rests from now on."""
        self._hurried.set()

    def relax(self) -> None:
        """Rest again."""
        self._hurried.clear()

    def give_up(self) -> None:
        """Send nothing more, for good."""
        self._given_up = True
        self._hurried.set()

    def check(self) -> None:
        """Raise CheckpointError if the upload was given up."""
        if self._given_up:
            raise CheckpointError("the process ended before the save did")


class Uploads:
    """Writes objects in threads. Use it in a `with`, from one thread; leaving it waits for what was submitted."""

    def __init__(self, store: Store, *, num_threads: int, pace: Pace, memory_bytes: int = MEMORY_BYTES) -> None:
        self._store, self._pace = store, pace
        self._memory_bytes = memory_bytes
        self._used_bytes = 0
        self._freed = threading.Condition()
        self._failed: BaseException | None = None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="upload")

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def reserve(self, num_bytes: int) -> None:
        """Wait until so much memory may be filled. Raises what an upload raised meanwhile, and if it was given up."""
        self._pace.check()
        with self._freed:
            self._freed.wait_for(
                lambda: self._failed or not self._used_bytes or self._used_bytes + num_bytes <= self._memory_bytes
            )
            if self._failed is not None:
                raise self._failed
            self._used_bytes += num_bytes

    def submit(self, key: str, parts: Sequence[Buffer], reserved: int) -> Future[StoredObject]:
        """Write an object; the memory reserved for it is free again when it is written."""
        # The pool keeps what it is given until the call returns, rests included.
        return self._pool.submit(self._write, key, [parts], reserved)

    def _write(self, key: str, only: list[Sequence[Buffer]], reserved: int) -> StoredObject:
        started_s = time.perf_counter()
        parts = only.pop()
        try:
            self._pace.check()
            return write_object(self._store, key, parts)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            del parts
            with self._freed:
                self._used_bytes -= reserved
                self._freed.notify_all()
            self._pace.rest(time.perf_counter() - started_s)
