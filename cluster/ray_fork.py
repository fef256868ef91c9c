"""What a Ray worker process and the fork server of its machine say to each other; see `ray_fork_server`."""

from __future__ import annotations

import json
import os
import shlex
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

READY, GO = b"r", b"g"
"""Said by the server when its imports are done and by the forked process; said by the client: become the worker."""
READY_TIMEOUT_S = 40
"""For the server's imports; Ray gives a worker process 60 s to come up."""
MOST_BYTES = 16 * 2**20
"""Of a request: an environment and a command line."""
_LENGTH = struct.Struct("!I")
_NUM_STREAMS = 3
_PEER = struct.Struct("3i")  # pid, uid, gid
# What Ray's worker process and Ray Train's actor in it import, and what every worker of ours does.
RAY_MODULES = (
    "ray._private.workers.default_worker",
    "ray._private.async_compat",
    "ray.train.v2._internal.execution.worker_group.worker",
    "cluster.ray_worker",
    "torch",
    "torch.distributed",
)
# Runtime environments that bring a Python of their own, or start workers in their own way.
_WITH_OWN_PYTHON = ("pip", "uv", "conda", "container", "image_uri", "py_executable", "nsight", "rocprof_sys")
# $0 is Ray's script for workers: the Python that belongs to it lies beside it. The driver's is the next best.
_START = (
    'python="${{0%/lib/python*}}/bin/python"; [ -x "$python" ] || python={driver}; '
    '"$python" -P -m cluster.ray_fork_client {modules} -- "$0" "$@" || exec "$python" "$0" "$@"'
)


@dataclass(frozen=True)
class ForkRequest:
    """What a forked process becomes: a script with its arguments, in an environment and a folder."""

    command: list[str]
    environment: dict[str, str]
    folder: str


def forked_runtime_env(job: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment that lets workers come from the machine's fork server.

    modules: to be imported beside what every worker imports.
    job: the runtime environment of the driver; where it brings its own Python, workers start as Ray starts them.
    A worker also starts as Ray starts it, by `exec`, where the fork server does not answer or dies.
    """
    if any(job.get(field) for field in _WITH_OWN_PYTHON):
        return {}
    script = _START.format(driver=shlex.quote(sys.executable), modules=shlex.join((*RAY_MODULES, *modules)))
    return {"py_executable": f"sh -c {shlex.quote(script)}"}


def send_request(connection: socket.socket, request: ForkRequest) -> None:
    """Send the request together with this process's standard streams."""
    text = json.dumps(asdict(request)).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(text))], range(_NUM_STREAMS))
    connection.sendall(text)


def receive_request(connection: socket.socket) -> tuple[ForkRequest, list[int]]:
    """Return a request and the descriptors of the standard streams that came with it, which are the caller's now.

    Raises:
        ConnectionError: the other side went away, or what it sent is no request.
    """
    head, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, _NUM_STREAMS)
    try:
        if len(head) != _LENGTH.size or len(streams) != _NUM_STREAMS:
            raise ConnectionError("found no request with three streams")
        (length,) = _LENGTH.unpack(head)
        if length > MOST_BYTES:
            raise ConnectionError(f"a request of {length:,} bytes, expected {MOST_BYTES:,} at most")
        text = bytearray()
        while len(text) < length:
            piece = connection.recv(length - len(text))
            if not piece:
                raise ConnectionError("the request ended early")
            text += piece
        try:
            return ForkRequest(**json.loads(text)), streams
        except (ValueError, TypeError, RecursionError) as error:
            raise ConnectionError(f"found no request: {error}") from error
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise


def refusal(place: str) -> str:
    """Return the file that says that the server of this socket forks no workers."""
    return f"{place}.refused"


def is_own_user(connection: socket.socket) -> bool:
    """Whether the other side of a unix socket belongs to this user: folders of Ray are open to everybody."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid == os.geteuid()
