"""`instdisc pack --address` on a Ray cluster of two nodes, one of which is lost meanwhile."""

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
NUM_IMAGES = 1500
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


def is_packing(node):
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray::pack_unit" in " ".join(process.cmdline()):
                    return True
    return False


@pytest.fixture
def cluster():
    """Two nodes of one core each on loopback addresses: the address of the head, the environment, the second node."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's unix sockets lie below it
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token}
    environment.pop("RAY_ADDRESS", None)
    address = f"{HEAD}:{free_port()}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        head = ["--head", f"--port={address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"]
        start_node(
            stack, folder, HEAD, environment, *head, "--include-dashboard=false", f"--temp-dir={folder / 'head'}"
        )
        second = start_node(stack, folder, SECOND, environment, f"--address={address}")
        yield address, environment, second


def tars_and_manifest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "train").iterdir()}


def test_a_node_that_is_lost_in_the_middle_changes_nothing(tmp_path, cluster):
    address, environment, second = cluster
    root = tmp_path / "photos/train/cat"
    root.mkdir(parents=True)
    Image.effect_noise((500, 375), 60).convert("RGB").save(root / "0.jpg", quality=90)
    for number in range(1, NUM_IMAGES):
        os.link(root / "0.jpg", root / f"{number}.jpg")
    pack = [sys.executable, "-m", "instdisc.cli.main", "pack", str(tmp_path / "photos"), "--shard-mb", "1"]
    with subprocess.Popen(
        [*pack, str(tmp_path / "there"), "--address", address], env=environment, stderr=subprocess.PIPE, text=True
    ) as packing:
        try:
            lose_when_packing(second, packing)
            _, told = packing.communicate(timeout=240)
        finally:
            packing.kill()
    assert packing.returncode == 0, told
    subprocess.run([*pack, str(tmp_path / "here")], check=True, capture_output=True)
    assert tars_and_manifest(tmp_path / "there") == tars_and_manifest(tmp_path / "here")


def lose_when_packing(node, packing):
    """Kill a node as soon as it packs something."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_packing(node):
        assert packing.poll() is None, packing.stderr.read()
        assert time.monotonic() < deadline, "the node was given nothing to pack"
        time.sleep(0.05)
    for process in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
