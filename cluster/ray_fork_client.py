"""Starts a Ray worker by a fork of the machine's fork server; the raylet runs this in place of the worker's Python.

    python -P -m cluster.ray_fork_client MODULE… -- SCRIPT ARGUMENT…

Ends with 0 once the worker is forked. Any other end means that nothing was forked, and that the caller should start
the script itself. The first call on a machine starts the server, so that its imports are done once for all workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.process_group import thread_environment
from cluster.ray_fork import GO, READY, READY_TIMEOUT_S, ForkRequest, is_own_user, refusal, send_request

ANSWER_TIMEOUT_S = LOCK_TIMEOUT_S = 5.0
BACKLOG = 256
# The server must have one thread: pyarrow, which Ray imports, starts one; OpenBLAS as many as it is told.
_WITHOUT_THREADS = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
}
_OF_ONE_WORKER = ("CUDA_VISIBLE_DEVICES",)  # read when CUDA is first used
_RAYLET_PID = "RAY_RAYLET_PID"
_SOCKET_OPTION = "--object-store-name="


def main(arguments: list[str]) -> int:
    """Return 0 if a worker was forked."""
    split = arguments.index("--")
    modules, command = arguments[:split], arguments[split + 1 :]
    request = ForkRequest(command, dict(os.environ), os.getcwd())
    try:
        with _connection(modules, request) as connection:
            connection.settimeout(READY_TIMEOUT_S)
            if not is_own_user(connection):
                raise PermissionError("the fork server is another user's")
            _expect_ready(connection)
            connection.settimeout(ANSWER_TIMEOUT_S)
            send_request(connection, request)
            _expect_ready(connection)
            connection.sendall(GO)
            return 0
    except (OSError, ValueError, KeyError, StopIteration) as error:
        print(f"no fork server ({error!r}): this worker starts by itself", file=sys.stderr)
        return 1


def _expect_ready(connection: socket.socket) -> None:
    if connection.recv(len(READY)) != READY:
        raise ConnectionError("the fork server gave up")


def _connection(modules: list[str], request: ForkRequest) -> socket.socket:
    """Connect to the server for such workers, started now if there is none."""
    plasma = next(a for a in request.command if a.startswith(_SOCKET_OPTION)).removeprefix(_SOCKET_OPTION)
    place = Path(plasma).parent / f"fork-{_key(modules, request)}"
    try:
        return _connect(place)
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    with _locked(f"{place}.lock"):
        if os.path.lexists(refusal(str(place))):
            raise ConnectionError("it refused before")
        try:
            return _connect(place)  # another worker's client was faster
        except (FileNotFoundError, ConnectionRefusedError):
            place.unlink(missing_ok=True)
            _start_server(place, modules, request.environment)
            return _connect(place)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock of this user's. OSError where another user's file is there, or it does not come free."""
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    lock = _own_file(path)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def _own_file(path: str) -> int:
    """Open a file of this user's, made if it is not there, to append to it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(f"{path} is another user's")
    return descriptor


def _key(modules: list[str], request: ForkRequest) -> str:
    """Name what the server's imports depend on: the program, its folder and the environment (a job has its own)."""
    environment = {name: value for name, value in request.environment.items() if name not in _OF_ONE_WORKER}
    named = [sys.executable, request.folder, modules, sorted(environment.items())]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]


def _connect(place: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(place))
    except BaseException:
        connection.close()
        raise
    return connection


def _start_server(place: Path, modules: list[str], environment: dict[str, str]) -> None:
    """Start the server with a socket that listens already: who connects waits until the imports are done."""
    with socket.socket(socket.AF_UNIX) as listening:
        mask = os.umask(0o177)
        try:
            listening.bind(str(place))
        finally:
            os.umask(mask)
        listening.listen(BACKLOG)
        output = _own_file(str(place.parent.parent / "logs" / f"{place.name}.log"))
        try:
            subprocess.Popen(
                [
                    sys.executable,
                    *("-P", "-m"),
                    "cluster.ray_fork_server",
                    str(listening.fileno()),
                    environment[_RAYLET_PID],
                    str(place),
                    *modules,
                ],
                env={**environment, **thread_environment(1), **_WITHOUT_THREADS},
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        finally:
            os.close(output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
