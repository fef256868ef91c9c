"""A coordinator in a process of its own, for worker processes of this machine, which call it through a unix socket.

Requests and answers are JSON texts; nothing that comes through the socket is executed.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from cluster import patience
from cluster.agreement import WorkerLike, gather
from cluster.coordination import (
    CLOSE_TIMEOUT_S,
    CoordinatorGoneError,
    CoordinatorService,
    CoordinatorSpec,
    packed,
    unpacked,
)
from cluster.interrupts import ignore_as_part
from cluster.process_name import set_process_name

GONE_TIMEOUT_S = 120.0
"""How long calls wait for a coordinator that is being started again."""
CALL_TIMEOUT_S = 900.0
"""For one call; the longest waits for another driver's heartbeat, and reads an unwilling store."""
MAX_STARTS = 100
_PAUSE_S = 0.05
_LONGEST_PLACE = 70
"""Bytes of the path of the temporary folder: sockets have 107, of which Python's fork server adds 32."""
_CLOSE = b"close"


def socket_of(folder: str) -> str:
    """Return the address of the coordinator whose socket is in a folder."""
    return os.path.join(folder, "coordinator")


def make_socket_folder() -> str:
    """Return a new folder for sockets, for this user alone. OSError where their addresses would be too long."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > _LONGEST_PLACE:
        raise OSError(
            errno.ENAMETOOLONG,
            f"the temporary folder's path has {len(os.fsencode(place))} bytes, expected at most {_LONGEST_PLACE}, as "
            "sockets lie in it; set TMPDIR to a shorter one, such as /tmp, or train in this process (workers=0)",
            place,
        )
    return tempfile.mkdtemp(prefix="npid-")


def serve(spec_json: str, folder: str, environment: dict[str, str]) -> None:
    """Run a coordinator until its parent process is gone or says that it may go. Entry point of the process."""
    ignore_as_part()
    set_process_name("coordinator")
    os.environ.clear()
    os.environ.update(environment)
    spec = CoordinatorSpec.from_json(spec_json)
    patience.expect(spec.reached)
    service = spec.start()
    closing = threading.Event()
    listener = listen(service, folder, closing)
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not closing.is_set():
        if wait([parent.sentinel], _PAUSE_S):
            # Workers do that, too, but the socket may be younger than they are.
            shutil.rmtree(folder, ignore_errors=True)
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
        process = self._context.Process(target=serve, args=arguments, name="coordinator")
        process.start()
        self._process = process  # one that could not be started cannot be ended, either

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
        self._process = None
        self.start()

    def end(self) -> None:
        """Let the process release the run and end; end it where it does not."""
        if self._process is None:
            return
        try:
            close_coordinator(self._folder)
            self._process.join(CLOSE_TIMEOUT_S)
        finally:
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
        deadline: float | None = None
        with self._lock:
            while True:
                try:
                    answer = self._exchange(request)
                    break
                except (EOFError, OSError) as error:  # of the socket; a plain OSError in the middle of a message
                    self._connection = None
                    # From the first failure: the call itself may have been at work for long.
                    deadline = deadline or time.monotonic() + GONE_TIMEOUT_S
                    if time.monotonic() > deadline:
                        raise CoordinatorGoneError(
                            f"the coordinator at {self._address} does not answer for {GONE_TIMEOUT_S:.0f} s: {error!r}"
                        ) from error
                    time.sleep(_PAUSE_S)
            if answer is None:
                self._connection = None
                raise CoordinatorGoneError(
                    f"the coordinator at {self._address} is there but has not answered {method!r} for "
                    f"{CALL_TIMEOUT_S:.0f} s"
                )
        return unpacked(answer)

    def _exchange(self, request: bytes) -> str | None:
        """Return the answer to a request, None where there is none in time."""
        if self._connection is None:
            self._connection = Client(self._address, family="AF_UNIX")
        self._connection.send_bytes(request)
        return self._connection.recv_bytes().decode() if self._connection.poll(CALL_TIMEOUT_S) else None


class HostedCoordination:
    """A coordinator in the process of rank 0, for the workers of one machine. Making one is collective; close it."""

    def __init__(self, spec: CoordinatorSpec, worker: WorkerLike) -> None:
        self._service: CoordinatorService | None = None
        self._folder: str | None = None
        self._listener: Listener | None = None
        self._coordination: LocalCoordination | None = None
        if worker.world_size == 1:
            self._service = spec.start()
            return
        folder = gather(worker, "start the coordinator", lambda: None if worker.rank else self._host(spec))[0]
        self._coordination = LocalCoordination(folder) if worker.rank else None

    def _host(self, spec: CoordinatorSpec) -> str:
        """Start the coordinator and listen; return the folder of its socket."""
        self._folder = make_socket_folder()
        self._service = spec.start()
        self._listener = listen(self._service, self._folder, threading.Event())
        return self._folder

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
