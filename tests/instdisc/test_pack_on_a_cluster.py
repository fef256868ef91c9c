"""`instdisc pack --address` on a Ray cluster of two nodes, one of which is lost meanwhile."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image
from ray_nodes import START_TIMEOUT_S, two_nodes

NUM_IMAGES = 1500


def is_packing(node):
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray::pack_unit" in " ".join(process.cmdline()):
                    return True
    return False


def tars_and_manifest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "train").iterdir()}


@pytest.fixture
def cluster():
    with two_nodes() as nodes:
        yield nodes


@pytest.mark.slow
def test_a_node_that_is_lost_in_the_middle_changes_nothing(tmp_path, cluster):
    address, environment, second = cluster.address, cluster.environment, cluster.second
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
