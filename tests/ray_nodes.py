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
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait(timeout=30)


@contextlib.contextmanager
def two_nodes():
    """Two nodes of one core each: the head's address, the environment, the processes of the head and the second."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's unix sockets lie below it
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token}
    environment.pop("RAY_ADDRESS", None)
    address = f"{HEAD}:{free_port()}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        head_options = ["--head", f"--port={address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"]
        options = [*head_options, "--include-dashboard=false", f"--temp-dir={folder / 'head'}"]
        head = start_node(stack, folder, HEAD, environment, *options)
        second = start_node(stack, folder, SECOND, environment, f"--address={address}")
        yield address, environment, head, second
