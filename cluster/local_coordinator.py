"""A coordinator in a process of its own, for worker processes of this machine, which call it through a unix socket.

Requests and answers are JSON texts; nothing that comes through the socket is executed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from cluster.agreement import WorkerLike
from cluster.coordination import (
    CLOSE_TIMEOUT_S,
    CoordinatorGoneError,
    CoordinatorService,
    CoordinatorSpec,
    packed,
    unpacked,
)
from cluster.process_name import set_process_name

GONE_TIMEOUT_S = 120.0
"""How long calls wait for a coordinator that is being started again."""
MAX_STARTS = 100
_PAUSE_S = 0.05
_CLOSE = b"close"


def socket_of(folder: str) -> str:
    """Return the address of the coordinator whose socket is in a folder."""
    return os.path.join(folder, "coordinator")


def serve(spec_json: str, folder: str, environment: dict[str, str]) -> None:
    """Run a coordinator until its parent process is gone or says that it may go. Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the driver decides
    set_process_name("coordinator")
    os.environ.clear()
    os.environ.update(environment)
    service = CoordinatorSpec.from_json(spec_json).start()
    closing = threading.Event()
    listener = listen(service, folder, closing)
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not closing.is_set():
        if wait([parent.sentinel], _PAUSE_S):
            os._exit(1)
    listener.close()
    service.close()


def listen(service: CoordinatorService, folder: str, closing: threading.Event) -> Listener:
    """Answer calls through the socket of a folder, in threads. closing: set by who tells the coordinator to end."""
    address = socket_of(folder)
    with contextlib.suppress(FileNotFoundError):  # a killed predecessor left its socket there
        os.unlink(address)
    listener = Listener(address, family="AF_UNIX")
    threading.Thread(target=_accept, args=(listener, service, closing), name="accept", daemon=True).start()
    return listener


def _accept(listener: Listener, service: CoordinatorService, closing: threading.Event) -> None:
    while True:
        try:
            connection = listener.accept()
        except OSError:
            return  # it was closed
        threading.Thread(target=_answer, args=(connection, service, closing), daemon=True).start()


def _answer(connection: Connection, service: CoordinatorService, closing: threading.Event) -> None:
    try:
        with connection:
            while True:
                request = connection.recv_bytes()
                if request == _CLOSE:
                    closing.set()
                    return
                connection.send_bytes(service.answer(request.decode()).encode())
    except (EOFError, OSError, UnicodeDecodeError):
        return  # the worker is gone, or it is none


def close_coordinator(folder: str) -> None:
    """Tell the coordinator of a folder to release the run and to end."""
    try:
        with Client(socket_of(folder), family="AF_UNIX") as connection:
            connection.send_bytes(_CLOSE)
    except OSError:
        pass  # it has ended


class LocalCoordinator:
    """The coordinator's process, as the supervisor of the workers sees it."""

    def __init__(self, spec: CoordinatorSpec, folder: str, context: ForkServerContext) -> None:
        self._spec, self._folder, self._context = spec, folder, context
        self._process: ForkServerProcess | None = None
        self._num_starts = 0

    def start(self) -> None:
        """Start the process; calls wait until it listens."""
        self._num_starts += 1
        arguments = (self._spec.to_json(), self._folder, dict(os.environ))
        self._process = self._context.Process(target=serve, args=arguments, name="coordinator")
        self._process.start()

    def is_dead(self) -> bool:
        """Whether the process was started and has ended."""
        return self._process is not None and bool(wait([self._process.sentinel], 0))

    def start_again(self) -> None:
        """Start the process again after its end. CoordinatorGoneError if that happens all the time."""
        assert self._process is not None, "it was started"
        self._process.join()
        if self._num_starts >= MAX_STARTS:
            raise CoordinatorGoneError(
                f"the coordinator of {self._spec.uri} ended {MAX_STARTS} times, last with exit code "
                f"{self._process.exitcode}; its messages stand above"
            )
        self._process.close()
        self.start()

    def end(self) -> None:
        """Let the process release the run and end; end it where it does not."""
        if self._process is None:
            return
        close_coordinator(self._folder)
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()


class LocalCoordination:
    """Calls the coordinator of a folder. Safe in threads, one call at a time; it connects anew after a restart."""

    def __init__(self, folder: str) -> None:
        self._address = socket_of(folder)
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def call(self, method: str, **arguments: Any) -> Any:
        """See `coordination.Coordination.call`."""
        request = packed(method, arguments).encode()
        deadline = time.monotonic() + GONE_TIMEOUT_S
        with self._lock:
            while True:
                try:
                    if self._connection is None:
                        self._connection = Client(self._address, family="AF_UNIX")
                    self._connection.send_bytes(request)
                    return unpacked(self._connection.recv_bytes().decode())
                except (EOFError, ConnectionError, FileNotFoundError) as error:
                    self._connection = None
                    if time.monotonic() > deadline:
                        raise CoordinatorGoneError(
                            f"the coordinator at {self._address} does not answer for {GONE_TIMEOUT_S:.0f} s"
                        ) from error
                    time.sleep(_PAUSE_S)


class HostedCoordination:
    """A coordinator in the process of rank 0, for the workers of one machine. Making one is collective; close it."""

    def __init__(self, spec: CoordinatorSpec, worker: WorkerLike) -> None:
        self._service = spec.start() if worker.rank == 0 else None
        self._folder: str | None = None
        self._listener: Listener | None = None
        self._coordination: LocalCoordination | None = None
        if worker.world_size == 1:
            return
        if self._service is not None:
            self._folder = tempfile.mkdtemp(prefix="npid-")
            self._listener = listen(self._service, self._folder, threading.Event())
        folder = worker.all_gather_object(self._folder)[0]
        self._coordination = LocalCoordination(folder) if worker.rank else None

    def call(self, method: str, **arguments: Any) -> Any:
        """See `coordination.Coordination.call`."""
        coordination = self._service or self._coordination
        assert coordination is not None
        return coordination.call(method, **arguments)

    def close(self) -> None:
        """Release the run, on rank 0."""
        if self._service is not None:
            self._service.close()
        if self._listener is not None and self._folder is not None:
            self._listener.close()
            shutil.rmtree(self._folder, ignore_errors=True)
