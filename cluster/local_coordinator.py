"""A coordinator in a process of its own, for worker processes of this machine, which call it through a unix socket.

Requests and answers are JSON texts; nothing that comes through the socket is executed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from cluster.coordination import CoordinatorGoneError, CoordinatorService, CoordinatorSpec, packed, unpacked

GONE_TIMEOUT_S = 120.0
"""How long calls wait for a coordinator that is being started again."""
_PAUSE_S = 0.05
_CLOSE = b"close"


def socket_of(folder: str) -> str:
    """Return the address of the coordinator whose socket is in a folder."""
    return os.path.join(folder, "coordinator")


def serve(spec_json: str, folder: str, environment: dict[str, str]) -> None:
    """Run a coordinator until its parent process is gone or says that it may go. Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the driver decides
    os.environ.clear()
    os.environ.update(environment)
    address = socket_of(folder)
    temporary = f"{address}.{os.getpid()}"
    service = CoordinatorSpec.from_json(spec_json).start()
    listener = Listener(temporary, family="AF_UNIX")
    os.replace(temporary, address)  # a killed predecessor left its socket there
    closing = threading.Event()
    threading.Thread(target=_accept, args=(listener, service, closing), name="accept", daemon=True).start()
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not closing.is_set():
        if wait([parent.sentinel], _PAUSE_S):
            os._exit(1)
    service.close()


def _accept(listener: Listener, service: CoordinatorService, closing: threading.Event) -> None:
    while True:
        connection = listener.accept()
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
