"""Downloads a data set's shards into the cache ahead of the training or the evaluation that reads them.

In block order the shards that a worker reads, and when, follow from the order: they are fetched in that order, and each
is marked with the time of its next use, so that the cache removes what is needed latest. In the full permutation every
shard is needed all the time: they are fetched as far as the cache has room. Evaluations read the same rows again and
again, nobody knows when: their shards take the room that training leaves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import closing

from dataloading.block_order import BlockOrder, ShardUse
from dataloading.cache import OVERDUE_S, Fetched
from dataloading.index import ShardLayout
from dataloading.io_threads import IoThreads
from dataloading.order import Order
from dataloading.shard_reader import DownloadStopped, RemoteShards

_LOG = logging.getLogger("instdisc.downloads")
_SHARDS_AT_ONCE = 2
_TICK_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = _TICK_S, 10.0
"""Between tries to find room: each looks at all files of the cache, and room comes when a shard's use is over."""
_REFRESH_S = OVERDUE_S / 6
_FIRST_GUESS_S_PER_STEP = 0.1
_LOOK_S = 0.1
HEAD_START_S = 30.0
"""How long an evaluation waits at most for its shards: a shard is one download, its images would be one each."""
_NEXT_EVALUATION_S = 24 * 3600.0
"""Shards of an evaluation are marked as needed so much later: what training reads sooner may take their place."""


class ShardDownloads:
    """A thread that keeps the cache ahead of one rank's part of the stream, from `start` to `close`."""

    def __init__(
        self, source: RemoteShards, layout: ShardLayout, order: Order, global_batch: int, offsets: tuple[int, int]
    ) -> None:
        self._source, self._numbers_S = source, layout.numbers_S.tolist()
        self._order, self._global_batch, self._offsets = order, global_batch, offsets
        self._step = self._ahead = 0
        self._clock = (0, time.time())
        self._stop = threading.Event()

    def start(self, step: int) -> None:
        """Begin, or begin anew, at a step."""
        self.close()
        self._stop = threading.Event()
        self._step = self._ahead = step
        self._clock = (step, time.time())
        threading.Thread(target=self._run, args=(self._stop,), name="download-shards", daemon=True).start()

    def read_ahead(self, step: int) -> None:
        """Say that the images of a step begin to be read."""
        self._ahead = step

    def advance(self, step: int) -> None:
        """Say that the images of a step, and of those before it, have been read."""
        self._step = step

    def close(self) -> None:
        """Stop; what is on its way is given up, and not waited for."""
        self._stop.set()

    def _run(self, stop: threading.Event) -> None:
        with closing(IoThreads(_SHARDS_AT_ONCE, "download-shard")) as threads:
            if isinstance(self._order, BlockOrder):
                self._follow_blocks(self._order, threads, stop)
            else:
                self._fill_cache(threads, stop)

    def _follow_blocks(self, order: BlockOrder, threads: IoThreads, stop: threading.Event) -> None:
        uses = order.uses_from(self._offsets, self._step * self._global_batch)
        active: list[ShardUse] = []
        under_way: dict[Future[Fetched | None], ShardUse] = {}
        waiting: deque[ShardUse] = deque()
        pause_s, pause_ends_s = _FIRST_PAUSE_S, 0.0
        while not stop.is_set():
            while len(under_way) < _SHARDS_AT_ONCE and time.monotonic() >= pause_ends_s and not stop.is_set():
                use = waiting.popleft() if waiting else next(uses)
                if use.first > self._step * self._global_batch + order.num_rows:
                    waiting.appendleft(use)  # an epoch ahead is far enough
                    break
                number = self._numbers_S[use.shard]
                future = threads.submit(_fetch, self._source, number, self._time_of(use.first), stop)
                under_way[future] = use
            if not under_way:
                stop.wait(_TICK_S)
            done, _ = wait(under_way, timeout=_TICK_S, return_when="FIRST_COMPLETED")
            for future in done:
                use = under_way.pop(future)
                if future.result() is Fetched.THERE:
                    active.append(use)
                    pause_s = _FIRST_PAUSE_S
                elif use.last >= self._step * self._global_batch:
                    # No room, or a storage that fails: later, unless its images were read one by one meanwhile.
                    waiting.appendleft(use)
                    pause_ends_s = time.monotonic() + pause_s
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            still_active = self._retire(order, active)
            if len(still_active) < len(active):
                pause_s, pause_ends_s = _FIRST_PAUSE_S, 0.0
            active = still_active

    def _retire(self, order: BlockOrder, active: list[ShardUse]) -> list[ShardUse]:
        """Mark the shards whose use is over with the time of their use in the next epoch; return the others."""
        position = self._step * self._global_batch
        over = [use for use in active if use.last < position]
        if not over:
            return active
        epoch = position // order.num_rows + 1
        next_uses: dict[int, int] = {}
        for use in (*order.uses(self._offsets, epoch - 1), *order.uses(self._offsets, epoch)):
            if use.last >= position:
                next_uses.setdefault(use.shard, use.first)
        for use in over:
            # A shard at a lane's border may be another rank's from now on: it goes first.
            first = next_uses.get(use.shard, position + 2 * order.num_rows)
            self._touch(use.shard, self._time_of(first))
        return [use for use in active if use.last >= position]

    def _fill_cache(self, threads: IoThreads, stop: threading.Event) -> None:
        # Workers of a machine begin at different shards, so that they do not ask for the same ones.
        start = len(self._numbers_S) * self._offsets[0] // self._global_batch
        in_turn = [*range(start, len(self._numbers_S)), *range(start)]
        while not stop.is_set():
            num_lost = self._source.num_lost
            missing = [shard for shard in in_turn if not self._source.is_here(self._numbers_S[shard])]
            is_complete = self._fetch_all(missing, threads, stop)
            refreshed = time.monotonic()
            for shard in in_turn:
                self._touch(shard, time.time())
            pause_s = _REFRESH_S if is_complete else 20 * _TICK_S
            while time.monotonic() - refreshed < pause_s and self._source.num_lost == num_lost:
                if stop.wait(_TICK_S):
                    return

    def _fetch_all(self, shards: Sequence[int], threads: IoThreads, stop: threading.Event) -> bool:
        """Fetch shards until there is no room for another, in which case there is none for the rest; whether all are
        there."""
        left, is_complete = deque(shards), True
        under_way: set[Future[Fetched | None]] = set()
        while (left or under_way) and not stop.is_set():
            while left and len(under_way) < _SHARDS_AT_ONCE:
                number = self._numbers_S[left.popleft()]
                under_way.add(threads.submit(_fetch, self._source, number, time.time(), stop))
            done, under_way = wait(under_way, timeout=_TICK_S, return_when="FIRST_COMPLETED")
            results = {future.result() for future in done}
            is_complete = is_complete and results <= {Fetched.THERE}
            if results & {Fetched.NO_ROOM, Fetched.REFUSED}:
                left.clear()
        return is_complete and not stop.is_set()

    def _touch(self, shard: int, next_use: float) -> None:
        if self._source.cache is not None:
            self._source.cache.touch(self._source.cache_key(self._numbers_S[shard]), next_use)

    def _time_of(self, position: int) -> float:
        """Return when a position will be read, at the speed so far."""
        (first, started), step, now = self._clock, self._step, time.time()
        pace_s = (now - started) / (step - first) if step - first >= 10 else _FIRST_GUESS_S_PER_STEP
        return now + max(0.0, (position / self._global_batch - self._ahead) * pace_s)


class EvaluationDownloads:
    """A thread that brings the shards of an evaluation's rows into the cache, from `start` to `close`."""

    def __init__(self, source: RemoteShards, shards: Sequence[int]) -> None:
        """shards: their numbers, in the order in which they are wanted."""
        self._source, self._shards = source, shards
        self._stop, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="download-evaluated-shards", daemon=True)

    def start(self, is_asked_to_end: Callable[[], bool] = lambda: False) -> None:
        """Begin; wait until the shards are here, there is no room for more, or `HEAD_START_S` is over.

        is_asked_to_end(): whether nobody wants to wait any more.
        """
        self._thread.start()
        deadline = time.monotonic() + HEAD_START_S
        while time.monotonic() < deadline and not is_asked_to_end():
            if self._over.wait(_LOOK_S):
                return

    def close(self) -> None:
        """Stop; what is on its way is given up, and not waited for."""
        self._stop.set()

    def _run(self) -> None:
        try:
            with closing(IoThreads(_SHARDS_AT_ONCE, "download-shard")) as threads:
                left = {threads.submit(self._fetch, number) for number in self._shards}
                while left and not self._stop.is_set():
                    done, left = wait(left, timeout=_TICK_S, return_when="FIRST_COMPLETED")
                    if {future.result() for future in done} & {Fetched.NO_ROOM, Fetched.REFUSED}:
                        self._stop.set()  # so will be the next ones: their images are read one by one
        finally:
            self._over.set()

    def _fetch(self, number: int) -> Fetched | None:
        return _fetch(self._source, number, time.time() + _NEXT_EVALUATION_S, self._stop)


def _fetch(source: RemoteShards, number: int, next_use: float, stop: threading.Event) -> Fetched | None:
    """Have a shard in the cache, after the process that downloads it; None where the storage fails or `stop` came."""
    try:
        while not stop.is_set():
            fetched = source.fetch(number, next_use, stop)
            if fetched is not Fetched.BUSY:
                return fetched
            stop.wait(_TICK_S)
    except DownloadStopped:
        pass
    except OSError as error:
        # The reader of an image meets the same failure and decides what it means.
        _LOG.warning("shard %s is not downloaded: %s", source.shards[number].name, error)
    return None
