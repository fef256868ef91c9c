"""Runs that are killed with SIGKILL from outside, and what they must be equal to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import torch

from cluster.checkpoint import Checkpoint, read_latest
from cluster.manifest import ManifestId
from instdisc.runs import Run

START_TIMEOUT_S = 120


def finish(command: list[str], timeout_s: float = 280) -> None:
    """Run a training command to its end."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr


def manifests(run: Path) -> list[ManifestId]:
    """Return the checkpoints of a run, the oldest first."""
    folder = run / "checkpoints" / "manifests"
    found = [ManifestId.from_key(f"manifests/{path.name}") for path in folder.glob("*.json")]
    return sorted(id for id in found if id is not None)


def kill_at_a_random_moment(command: list[str], run: Path, whom: str, chance: random.Random) -> None:
    """Start the run, wait for its first new checkpoint and a little more, and kill the driver or one of 3 workers."""
    before = manifests(run)
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    started_s = time.monotonic()
    while manifests(run) == before:
        assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
        assert time.monotonic() - started_s < START_TIMEOUT_S
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.8))
    family = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in family if process.name().startswith("rank-")]
    assert len(workers) == 3
    victim = driver.pid if whom == "driver" else chance.choice(workers).pid
    os.kill(victim, signal.SIGKILL)
    driver.communicate(timeout=60)
    assert driver.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def assert_same_to_the_bit(found: Path, expected: Path, steps: int) -> None:
    """Compare the last checkpoints of two runs: weights, optimiser, bank, curves."""
    ours, theirs = (read_latest(Run(str(run)).checkpoints()) for run in (found, expected))
    assert ours is not None
    assert ours.step == steps
    assert differences(ours, theirs) == []


def differences(ours: Checkpoint | None, theirs: Checkpoint | None) -> list[str]:
    """Return what differs between two checkpoints, bit by bit."""
    assert ours is not None
    assert theirs is not None
    mine, other = ours.tensors(), theirs.tensors()
    assert mine.keys() == other.keys()
    assert ours.tables.keys() == theirs.tables.keys()
    different = [name for name in mine if not torch.equal(mine[name], other[name])]
    different += [table for table in ours.tables if not torch.equal(ours.rows(table), theirs.rows(table))]
    if ours.step != theirs.step:
        different.append(f"step {ours.step} instead of {theirs.step}")
    return different + [name for name in ("normalizer", "curves") if ours.state[name] != theirs.state[name]]
