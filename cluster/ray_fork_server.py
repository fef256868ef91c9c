"""A machine's fork server: imports once what every worker of a run needs, and forks Ray's workers from there.

A worker of Ray imports Ray, Ray Train, torch and the training loop, seconds of processor time, before it does anything;
after a failure all workers of a run do so at once. Here they come in milliseconds, and share the memory of what was
imported. The server forks while it has one thread and before anything uses torch, CUDA or Ray, which is what makes a
fork safe, and before Ray draws random numbers, or all workers would draw the same. It looks whether it is so, and
otherwise refuses to serve: workers then start as Ray starts them.

It ends with the raylet, or after `IDLE_S` without a worker.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

from cluster.process_name import set_process_name
from cluster.ray_fork import GO, READY, READY_TIMEOUT_S, ForkRequest, is_own_user, receive_request, refusal

IDLE_S = 60.0
"""Longer than it takes from the end of a group of workers to the next one; a server holds half a gigabyte."""
REQUEST_TIMEOUT_S = 5.0
IMPORT_TIMEOUT_S = READY_TIMEOUT_S - 5
MOST_CRASHES, CRASH_S = 3, 30.0
"""Workers in a row that crash so soon after their fork: something that was imported does not bear it."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
NAME = "fork-server"


class ForkRefused(Exception):
    """Workers must not be forked from this process."""


class ForkServer:
    """Forks for everybody who asks at a listening unix socket, until the raylet ends or nobody is left."""

    def __init__(self, listening: socket.socket, raylet_pid: int) -> None:
        self._listening = listening
        self._raylet = os.pidfd_open(raylet_pid)
        self._woken, self._wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._children: dict[int, float] = {}
        """The living workers, and when they were forked."""
        self._num_crashes = 0
        self._idle_since_s = time.monotonic()

    def serve(self) -> ForkRequest | None:
        """Return None at the end; return in each forked process what it is to become, with its streams in place."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        poll = select.poll()
        for fd in (self._listening.fileno(), self._raylet, self._woken):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(int(IDLE_S * 1000))}
            if self._raylet in ready:
                return None
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
            self._reap()
            if self._num_crashes >= MOST_CRASHES:
                raise ForkRefused(f"{self._num_crashes} workers crashed within {CRASH_S:g} s of their fork")
            if self._listening.fileno() in ready:
                try:
                    request = self._answer()
                except OSError as error:
                    print(f"no more workers are forked here: {error!r}", flush=True)
                    return None
                if request is not None:
                    return request
            elif not self._children and time.monotonic() - self._idle_since_s >= IDLE_S:
                return None

    def _reap(self) -> None:
        """Let ended workers go: a raylet that ended one waits until it is gone."""
        now_s = time.monotonic()
        for pid, since_s in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[pid]
                self._idle_since_s = now_s
                is_crash = os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES and now_s - since_s < CRASH_S
                self._num_crashes = self._num_crashes + 1 if is_crash else 0

    def _answer(self) -> ForkRequest | None:
        """Fork for one client; return its request in the forked process. What fails costs this client only.

        Raises OSError where no connection can be taken for want of descriptors or memory: the next one would not be.
        """
        connection, _ = self._listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(REQUEST_TIMEOUT_S)
            if not is_own_user(connection):
                return None
            connection.sendall(READY)
            request, streams = receive_request(connection)
            try:
                pid = os.fork()
                if pid == 0:
                    self._leave(connection, streams)
                    return request
                self._children[pid] = time.monotonic()
            finally:
                for stream in streams:
                    os.close(stream)
        return None

    def _leave(self, connection: socket.socket, streams: list[int]) -> None:
        """In the forked process: take the worker's streams, let go of what is the server's, and wait for the client."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._listening.close()
            for fd in (self._raylet, self._woken, self._wakes):
                os.close(fd)
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
            connection.sendall(READY)
            if connection.recv(len(GO)) != GO:  # it has given up, and starts the worker itself
                os._exit(0)
        except BaseException:
            os._exit(1)


def become(request: ForkRequest) -> None:
    """Run the script as Python would have, had it been started for it."""
    os.setsid()
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    set_process_name("python")
    gc.enable()
    atexit.register(gc.unfreeze)  # or C++ libraries take what is left at the end for leaks, and say so
    _draw_anew()
    sys.argv = list(request.command)
    sys.path.insert(0, os.path.dirname(request.command[0]))
    runpy.run_path(request.command[0], run_name="__main__")


def _draw_anew() -> None:
    """Seed what would draw the same numbers in all forked processes; Python's own generators do so by themselves."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def check_alone() -> None:
    """Raise ForkRefused where this process must not fork workers."""
    num_threads = len(os.listdir("/proc/self/task"))  # those of C libraries as well
    if num_threads != 1:
        raise ForkRefused(f"found {num_threads} threads after the imports, expected 1")
    if any(target.startswith("/dev/nvidia") for target in _open_files()):
        raise ForkRefused("found a GPU in use after the imports: CUDA does not work in a fork then")
    if _drawn_in_a_fork() == _drawn_in_a_fork():
        raise ForkRefused("found the same ids of Ray in two forked processes, expected different ones")


def _open_files() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the listing itself
            yield os.readlink(f"/proc/self/fd/{fd}")


def _drawn_in_a_fork() -> bytes:
    from ray import ObjectID

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, ObjectID.from_random().binary())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as drawn:
        found = drawn.read()
    os.waitpid(pid, 0)
    return found


def _import(modules: Sequence[str]) -> None:
    """Import the modules without a use of Ray's generator, from which its modules draw ids of their actor classes."""
    import ray.actor
    from ray import ActorClassID

    class FromTheSystem:
        @staticmethod
        def from_random() -> ActorClassID:
            return ActorClassID(os.urandom(ActorClassID.size()))

    ray.actor.ActorClassID = FromTheSystem  # pyright: ignore[reportPrivateImportUsage]
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        ray.actor.ActorClassID = ActorClassID  # pyright: ignore[reportPrivateImportUsage]


def main(arguments: Sequence[str]) -> None:
    """Import and serve: LISTENING_FD RAYLET_PID SOCKET MODULE…. A refusal is left beside the socket, for clients."""
    listening_fd, raylet_pid, place, *modules = arguments
    set_process_name(NAME)
    request = None
    with socket.socket(fileno=int(listening_fd)) as listening:
        try:
            server = ForkServer(listening, int(raylet_pid))
            gc.disable()
            signal.signal(signal.SIGALRM, _raise_too_slow)
            signal.alarm(IMPORT_TIMEOUT_S)
            _import(modules)
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            check_alone()
            gc.collect()
            gc.freeze()  # collections in workers would otherwise write to, and so copy, the shared pages
            request = server.serve()
        except Exception as error:
            print(f"no workers are forked here: {error!r}", flush=True)
            with contextlib.suppress(OSError):
                os.close(os.open(refusal(place), os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        finally:
            if request is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(place)  # before the socket is closed: the place may then be another server's
    if request is not None:
        become(request)


def _raise_too_slow(*_: object) -> None:
    raise ForkRefused(f"the imports took more than {IMPORT_TIMEOUT_S} s")


if __name__ == "__main__":
    main(sys.argv[1:])
