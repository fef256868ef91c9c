"""The head of a real Ray cluster on loopback, with its dashboard: it can be killed, and started again on its ports."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from families import family

ADDRESS = "127.0.0.2"
"""Ray replaces 127.0.0.1 by the address of the network card."""
START_TIMEOUT_S = 90.0
MAX_STARTS = 3
"""Ray gives its own processes 30 s."""


class RayHead:
    """A head with token authentication, and a node's cores. In a test: `with RayHead(num_cpus=2) as head:`.

    variables: of the environment of its jobs.
    """

    def __init__(self, num_cpus: int = 2, variables: dict[str, str] | None = None) -> None:
        self.num_cpus, self.variables = num_cpus, variables or {}
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's unix sockets lie below it
        self.ports = _free_ports(4)
        self.token = secrets.token_hex(32)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for whoever uses the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        return {**kept, **ray, "PATH": path, "NO_PROXY": "127.0.0.1"}

    def __enter__(self) -> RayHead:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is not None:
            print(f"the head ended by itself:\n{self.log}")
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the head, and wait until it takes jobs. A busy machine may need several tries."""
        for _ in range(MAX_STARTS):
            if self._start():
                return
            self.kill()
        raise TimeoutError(f"no head after {MAX_STARTS} tries:\n{self.log}")

    @property
    def log(self) -> str:
        return (self.folder / "head.log").read_text()

    def _start(self) -> bool:
        port, dashboard, client, agent = self.ports
        command = [
            *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--port={port}", f"--ray-client-server-port={client}", f"--node-ip-address={ADDRESS}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--temp-dir={self.folder}", f"--num-cpus={self.num_cpus}", f"--object-store-memory={80 * 2**20}"),
        ]
        with open(self.folder / "head.log", "wb") as told:
            # Of its own: a session, so that nothing of it is met by the terminal's Ctrl-C.
            self.process = subprocess.Popen(
                command,
                env={**self.environment, **self.variables, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
                stdout=told,
                stderr=told,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in self.log:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        """Kill the head and whatever it started, as a machine that is gone."""
        if self.process is None:
            return
        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=30)
        psutil.wait_procs(family, timeout=30)
        self.process = None

    def family(self) -> list[psutil.Process]:
        """Return the processes of the head and of its jobs, which are sessions of their own."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            head = psutil.Process(self.process.pid)
            return [*family(head.pid), head]
        return []

    def drivers(self, argument: str) -> list[psutil.Process]:
        """Return the Python processes of jobs whose command line has an argument."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                if line and "python" in line[0] and argument in line[1:]:
                    found.append(process)
        return found


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(number)]
        for server in servers:
            server.bind((ADDRESS, 0))
        return [server.getsockname()[1] for server in servers]
