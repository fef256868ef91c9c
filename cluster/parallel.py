"""A parallel map over the cores of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from cluster.interrupts import ignore_as_part


class MapProcessDied(RuntimeError):
    """A process of a parallel map was killed."""


@dataclass(frozen=True)
class ProcessMap:
    """Calls a function in processes of this machine: `ProcessMap(4)(function, items)`."""

    num_processes: int
    """0 calls it in this process."""

    def __post_init__(self) -> None:
        if self.num_processes < 0:
            raise ValueError(f"processes: found {self.num_processes}, expected 0 (this process) or more")

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield function(item) for all items, as they are done; few items are alive at a time.

        function: at the top level of a module, it and the items picklable. What it raises ends the map, and the
        processes end with this one even where it is killed. Raises MapProcessDied where one of them was killed.
        """
        if self.num_processes == 0:
            yield from map(function, items)
            return
        # Not fork: this process may have threads, whose locks a forked one would wait for.
        context = multiprocessing.get_context("spawn")
        left = iter(items)
        with ProcessPoolExecutor(self.num_processes, context, initializer=_follow_parent) as pool:
            waiting = {pool.submit(function, item) for item in islice(left, 2 * self.num_processes)}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    waiting |= {pool.submit(function, item) for item in islice(left, len(done))}
                    yield from (future.result() for future in done)
            except BaseException as error:
                # What they are at work on may take minutes, and nobody wants it any more. By SIGKILL: they leave
                # SIGTERM, with which a broken pool ends the others, to this process.
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise MapProcessDied(
                        "a worker process was killed (out of memory, or a decoder crashed on a hostile image); what "
                        "was done is kept, the same command goes on"
                    ) from error
                raise


def _follow_parent() -> None:
    ignore_as_part()
    threading.Thread(target=_exit_after_parent, name="die-with-parent", daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
