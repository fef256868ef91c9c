"""Nodes of a real Ray cluster on loopback addresses, each of which ends with its context."""

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

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
START_TIMEOUT_S = 120


def free_port():
    with socket.socket() as server:
        server.bind((HEAD, 0))
        return server.getsockname()[1]


def start_node(stack, folder, host, environment, *arguments):
    """Start a node, which ends with `stack`, and return its process when it is up."""
    ray = Path(sys.executable).with_name("ray")
    fixed = ["--num-cpus=1", f"--node-ip-address={host}", "--block", f"--object-store-memory={80 * 2**20}"]
    command = [ray, "start", *arguments, *fixed, "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    told = folder / f"{host}.log"
    with open(told, "w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    stack.callback(end, node)
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in told.read_text():
        assert node.poll() is None, told.read_text()
        assert time.monotonic() < deadline, told.read_text()
        time.sleep(0.2)
    return node


def end(node):
    """Kill a node and whatever it started."""
    processes = family(node.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        processes.append(psutil.Process(node.pid))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait(timeout=30)
    psutil.wait_procs(processes, timeout=30)


class TwoNodes:
    """A head and a second node of one core each, with a token of their own. variables: of the environment of both."""

    def __init__(self, stack: contextlib.ExitStack, **variables: str):
        self._stack = stack
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's unix sockets lie below it
        stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**os.environ, **token, **variables}
        self.environment.pop("RAY_ADDRESS", None)
        self.address = f"{HEAD}:{free_port()}"
        self.start_head()
        self.second = start_node(stack, self._folder, SECOND, self.environment, f"--address={self.address}")

    def start_head(self):
        """Start the head, again if it was ended."""
        # Of its own each time: in a folder that was used before, Ray takes the second node's processes for a head's.
        folder = tempfile.mkdtemp(prefix="h", dir=self._folder)
        ports = [f"--port={self.address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"]
        options = ["--head", *ports, "--include-dashboard=false", f"--temp-dir={folder}"]
        self.head = start_node(self._stack, self._folder, HEAD, self.environment, *options)


@contextlib.contextmanager
def two_nodes(**variables: str):
    """Two nodes for the time of the context; see TwoNodes."""
    with contextlib.ExitStack() as stack:
        yield TwoNodes(stack, **variables)
