"""A job's log, followed while it grows: each line once, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time

from cluster.job import JobsError
from cluster.ray_jobs import HeadAwayError, RayJobs

END_TIMEOUT_S = 5.0
SILENCE_S = 60.0
"""A connection that brings nothing for so long is made anew: a dead one looks like a job with nothing to say."""
_PAUSE_S = 2.0


class JobLog:
    """The log of one job. `read` it again and again, `finish` it when the job is over."""

    def __init__(self, jobs: RayJobs, job_id: str) -> None:
        self._jobs, self.job_id = jobs, job_id
        self._num_read = 0
        """Characters that were given out; the server always sends the log from its start."""
        self._tail: _Tail | None = None
        self._opened_s = -float("inf")

    def read(self, timeout_s: float) -> str:
        """Return what the log has got since, "" if that is nothing for `timeout_s` seconds."""
        now_s = time.monotonic()
        if (self._tail is None or self._tail.is_useless()) and now_s - self._opened_s >= _PAUSE_S:
            has_failed = self._tail is not None and self._tail.has_failed()
            self.disconnect()
            self._tail, self._opened_s = _Tail(self._jobs, self.job_id, self._num_read), now_s
            if has_failed:  # there may be a gateway on the way that passes no web sockets
                with contextlib.suppress(JobsError, HeadAwayError):
                    return self._count(self._jobs.log(self.job_id)[self._num_read :])
        if self._tail is None:
            time.sleep(timeout_s)
            return ""
        return self._count(self._tail.take(timeout_s))

    def finish(self) -> str:
        """Return the rest of the log of a job that is over. JobsError or HeadAwayError where it cannot be read."""
        self.disconnect()
        return self._count(self._jobs.log(self.job_id)[self._num_read :])

    def disconnect(self) -> None:
        """Close the connection; the next `read` makes another."""
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def _count(self, text: str) -> str:
        self._num_read += len(text)
        return text


class _Tail:
    """One connection that brings a log, in a thread of its own."""

    def __init__(self, jobs: RayJobs, job_id: str, num_known: int) -> None:
        self._jobs, self._job_id, self._num_known = jobs, job_id, num_known
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._receive())
        self._heard_s, self._has_brought = time.monotonic(), False
        self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> str:
        """Return what came, waiting for it."""
        try:
            texts = [self._texts.get(timeout=timeout_s)]
        except queue.Empty:
            return ""
        while not self._texts.empty():
            texts.append(self._texts.get())
        self._heard_s = time.monotonic()
        return "".join(texts)

    def is_useless(self) -> bool:
        """Whether nothing will come any more, or so it seems."""
        ended = not self._thread.is_alive() and self._texts.empty()
        return ended or time.monotonic() - self._heard_s > SILENCE_S

    def has_failed(self) -> bool:
        """Whether it ended without having brought anything."""
        return not self._thread.is_alive() and not self._has_brought

    def close(self) -> None:
        """End the thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(END_TIMEOUT_S)

    def _run(self) -> None:
        # It broke or was refused: whoever asks for the job's state learns why.
        with contextlib.suppress(asyncio.CancelledError, Exception):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _receive(self) -> None:
        known = self._num_known
        async for text in self._jobs.tail(self._job_id):
            new, known = text[known:], max(0, known - len(text))
            self._has_brought = True
            if new:
                self._texts.put(new)
