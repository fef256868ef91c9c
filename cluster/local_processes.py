"""The supervisor of `run_local`: starts worker processes, watches them, ends all of them when one fails.

The processes come from Python's fork server: a helper that imports torch once (seconds) and forks each worker
from there (milliseconds), so the second call in a process starts at once. It stays until the caller's process
ends. The helper forks while it has one thread and before anything uses torch, which is what makes a fork safe;
the caller itself, which may hold threads, CUDA or S3 connections, is never forked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from cluster import patience
from cluster.coordination import CoordinatorSpec, wish_for_save
from cluster.environment import environment
from cluster.failures import Failure, WorkerDied, root_cause
from cluster.interrupts import Interrupts, held, kept_from_parts
from cluster.local_child import EVENT, FAILURE, LocalTask, run_worker
from cluster.local_coordinator import LocalCoordination, LocalCoordinator, make_socket_folder
from cluster.process_group import thread_environment

POLL_INTERVAL_S = 0.1
ECHO_GRACE_S = 2.0


class LocalProcess:
    """One worker process, as the supervisor sees it."""

    def __init__(self, rank: int, process: ForkServerProcess, connection: Connection):
        self.rank = rank
        self.process = process
        self.connection = connection
        self.result: bytes | None = None
        self.failure: Failure | None = None
        self.exit_code: int | None = None
        self.connected = True

    @property
    def ended(self) -> bool:
        """Whether nothing more can come from this rank."""
        return not self.connected and self.exit_code is not None

    @property
    def failed(self) -> bool:
        """Whether this rank raised, or ended without a result."""
        return self.failure is not None or (self.ended and self.result is None)

    def waitables(self) -> list[Connection | int]:
        """What becomes ready when this rank has news."""
        connection = [self.connection] if self.connected else []
        sentinel = [self.process.sentinel] if self.exit_code is None else []
        return [*connection, *sentinel]

    def receive(self, on_event: Callable[[str], None]) -> None:
        """Take in all news of this rank without waiting."""
        while self.connected and self.connection.poll():
            try:
                kind, content = self.connection.recv()
            except (EOFError, OSError):  # it closed the pipe, or was killed in the middle of a message
                self.connected = False
                break
            if kind == EVENT:
                on_event(content)
            elif kind == FAILURE:
                self.failure = content
            else:
                self.result = content
        if self.exit_code is None and wait([self.process.sentinel], 0):
            self.process.join()
            self.exit_code = self.process.exitcode


def run_processes(
    fn: Callable[..., Any],
    args: tuple,
    num_workers: int,
    num_threads: int,
    interrupts: Interrupts,
    on_event: Callable[[str], None],
    preload: Sequence[str] = (),
    coordinator: CoordinatorSpec | None = None,
) -> list[Any]:
    """Run `fn(worker, *args)` in `num_workers` processes; see `cluster.worker.run_local`.

    on_event: takes rank 0's events as JSON text.
    """
    call = _pickled_call(fn, args)
    folder = make_socket_folder()
    workers: list[LocalProcess] = []
    supervised = LocalCoordinator(coordinator, folder, _context(preload)) if coordinator else None
    try:
        if supervised is not None:
            with _helper_environment():
                supervised.start()
        for rank in range(num_workers):
            task = LocalTask(
                call=call,
                rank=rank,
                world_size=num_workers,
                num_threads=num_threads,
                folder=folder,
                environment={**os.environ, **thread_environment(num_threads), "GLOO_SOCKET_IFNAME": "lo"},
                has_coordinator=coordinator is not None,
                reached=patience.reached(),
            )
            workers.append(_start(task, preload))
        if supervised is not None:
            interrupts.save_with(partial(wish_for_save, LocalCoordination(folder)))
        interrupts.is_orderly = supervised is None
        _supervise(workers, interrupts, on_event, supervised)
        return [pickle.loads(worker.result or b"") for worker in workers]
    finally:
        # Whoever presses Ctrl-C again and again must not leave a coordinator behind that goes on holding the run.
        try:
            with held():
                _end_all(workers)
        finally:
            try:
                with held():
                    if supervised is not None:
                        supervised.end()
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _pickled_call(fn: Callable[..., Any], args: tuple) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except Exception as error:
        name = getattr(fn, "__qualname__", repr(fn))
        raise ValueError(
            f"{name} and its arguments cannot be sent to worker processes ({error}); pass a function from the top "
            "level of a module (no lambda, no nested function) and picklable arguments, or use num_workers=0"
        ) from error


def _start(task: LocalTask, preload: Sequence[str]) -> LocalProcess:
    context = _context(preload)
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(task, theirs), name=f"rank-{task.rank}")
    with _helper_environment():
        process.start()
    theirs.close()
    return LocalProcess(task.rank, process, ours)


def _context(preload: Sequence[str]) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", *preload])
    return context


@contextlib.contextmanager
def _helper_environment() -> Iterator[None]:
    """What processes that start now inherit: passive OpenMP, one thread, and no Ctrl-C of the driver's."""
    # Started on the way, it would let Ctrl-C through again.
    resource_tracker.ensure_running()
    with kept_from_parts(), environment(thread_environment(1)), _without_unreadable_main():
        yield


@contextlib.contextmanager
def _without_unreadable_main() -> Iterator[None]:
    """Of a script from standard input, which no other process can read, the new process shall not import the file."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or os.path.exists(path):
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path


def _supervise(
    workers: list[LocalProcess],
    interrupts: Interrupts,
    on_event: Callable[[str], None],
    coordinator: LocalCoordinator | None,
) -> None:
    """Return when every rank has a result; raise the cause as soon as one fails."""
    stop_sent = False
    while not all(worker.result is not None and worker.ended for worker in workers):
        wait([ready for worker in workers for ready in worker.waitables()], POLL_INTERVAL_S)
        if coordinator is not None and coordinator.is_dead():
            with _helper_environment():
                coordinator.start_again()
        for worker in workers:
            worker.receive(on_event)
        if any(worker.failed for worker in workers):
            raise _cause(workers, on_event)
        if interrupts.requested and not stop_sent:
            stop_sent = True
            for worker in workers:
                with contextlib.suppress(OSError):  # it has just ended
                    worker.connection.send("stop")


def _cause(workers: list[LocalProcess], on_event: Callable[[str], None]) -> BaseException:
    """Why the run failed: when one rank ends, the others fail in their collectives an instant later or before."""
    deadline = time.monotonic() + ECHO_GRACE_S
    failures: list[Failure] = []
    while True:
        for worker in workers:
            worker.receive(on_event)
            if worker.failure is not None and worker.failure not in failures:
                failures.append(worker.failure)
        dead = [worker for worker in workers if worker.ended and worker.result is None and not worker.failure]
        if dead:
            return WorkerDied(dead[0].rank, dead[0].exit_code or 0)
        if any(not failure.is_echo() for failure in failures) or time.monotonic() > deadline:
            return root_cause(failures).to_exception()
        wait([ready for worker in workers for ready in worker.waitables()], POLL_INTERVAL_S)


def _end_all(workers: list[LocalProcess]) -> None:
    """Leave no process behind: wait for those that have a result, end the others."""
    for worker in workers:
        if worker.exit_code is None:
            worker.process.kill()  # they leave SIGTERM to the driver
    for worker in workers:
        worker.process.join()
        worker.process.close()
        worker.connection.close()
