"""TensorBoard event files of a run in a store that cannot append, such as S3: written here, put one after the other.

An object does not grow, and putting one again at every flush would send a run's events again and again. So the present
file ends every so often, if there is something in it, is put once under its name, and the next events go into another.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore - generated code

from cluster.store import Store
from instdisc.progress import counted
from instdisc.train.event_file import EventFile, event_file_name

SHORTEST_S, LONGEST_S = 30.0, 600.0
_FILES_TO_DOUBLE = 8
MAX_BYTES = 8 * 2**20
"""A file that is larger ends at once: a thread reads it into memory to put it."""
RETRY_S = 30.0
"""Pause after a put that failed; the store itself tries for minutes."""
CLOSE_S = 20.0
"""How long the end of a run waits for its last events."""
_TICK_S = 0.5


def interval_s(num_files: int) -> float:
    """Return for how many seconds a file is written, by the number of files that the run has.

    A TensorBoard that starts reads all files, and takes 0.2 s of processor time for each; a person wants fresh points.
    From 30 s at first to 10 minutes: 36 files after an hour, 216 after a day, 504 after three days.
    """
    return min(LONGEST_S, SHORTEST_S * (1 + num_files / _FILES_TO_DOUBLE))


class EventMirror:
    """The event files of one attempt; a thread puts them into the store, so that training never waits.

    Files that wait have no name on the disk: nothing is left of them, however this process ends. As long as one waits
    because the store does not take it, the next one grows.
    """

    def __init__(self, store: Store, attempt: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._attempt, self._clock = store, attempt, clock
        self._lock = threading.Lock()
        self._file: EventFile | None = None
        self._begun_s = 0.0
        self._is_wanted = False
        self._num_ended = self._num_in_store = 0
        self._waiting: deque[tuple[str, EventFile]] = deque()
        self._retry_at_s = 0.0
        self._reason = ""
        self._has_told = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="event-mirror", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, event: Event) -> None:
        """See `EventSink`."""
        with self._lock:
            if self._file is None:
                self._file = EventFile(tempfile.TemporaryFile())  # noqa: SIM115
                self._begun_s = self._clock()
            self._file.add(event)
            if self._file.num_bytes >= MAX_BYTES:
                self._end(self._file)  # here, as the thread may be waiting for the store

    def flush(self) -> None:
        """Let the present file end soon: a run that goes on from here should not lack points before."""
        with self._lock:
            self._is_wanted = self._file is not None

    def close(self) -> None:
        """Put what is left, for at most `CLOSE_S` seconds."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def take_problem(self) -> str | None:
        """Return that the store takes no events, once; after the end, what did not get there."""
        if self._closing.is_set():
            missing = len(self._waiting) + (self._file is not None)
            if not missing:
                return None
            why = self._reason or f"it took longer than {CLOSE_S:.0f} s"
            return f"the last TensorBoard events did not reach {self._store.uri} ({counted(missing, 'file')}): {why}"
        if not self._reason or self._has_told:
            return None
        self._has_told = True
        return (
            f"TensorBoard events do not reach {self._store.uri}: {self._reason}. They are kept and put there later; "
            "training goes on"
        )

    def _work(self) -> None:
        self._count()
        is_last = False
        while not is_last:
            is_last = self._closing.wait(_TICK_S)
            with self._lock:
                if self._file is not None and (is_last or self._is_due()):
                    self._end(self._file)
            if is_last or self._clock() >= self._retry_at_s:
                self._put_waiting()

    def _count(self) -> None:
        """Count the files of the attempts before: how often a file ends depends on how many the run has."""
        try:
            self._num_in_store = len(self._store.list())
        except OSError as error:
            self._failed(error)

    def _is_due(self) -> bool:
        if self._waiting:
            return False
        # Soon after a start somebody wants to see that it went well.
        limit_s = SHORTEST_S if self._num_ended == 0 else interval_s(self._num_in_store)
        return self._clock() - self._begun_s >= (limit_s / 2 if self._is_wanted else limit_s)

    def _end(self, file: EventFile) -> None:
        self._waiting.append((event_file_name(self._attempt, self._num_ended), file))
        self._file, self._is_wanted = None, False
        self._num_ended += 1

    def _put_waiting(self) -> None:
        while self._waiting:
            name, file = self._waiting[0]
            try:
                self._store.put(name, file.content())
            except OSError as error:
                self._failed(error)
                return
            self._waiting.popleft()
            file.close()
            self._num_in_store += 1
            self._reason = ""

    def _failed(self, error: OSError) -> None:
        self._reason = str(error)
        self._retry_at_s = self._clock() + RETRY_S
