"""A run killed with SIGKILL from outside and started again with the same command: bit for bit the uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_data import write_cifar10

from cluster.checkpoint import read_latest
from cluster.manifest import ManifestId
from dataloading.stream import last_steps
from instdisc.runs import Run

NUM_ROWS, GLOBAL_BATCH, STEPS = 103, 12, 240
START_TIMEOUT_S = 120


def command(root: Path, run: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, "-m", "instdisc.cli.main", "train", "cifar10-cpu", "--run", str(run)),
        *("--launcher", "local", "--workers", str(workers), "--data.root", str(root), "--data.max_rows", "none"),
        *("--model.architecture", "resnet-small", "--model.width", "8", "--model.blocks", "1,1"),
        *("--model.head", "linear", "--model.feature_dim", "16", "--eval.k", "5"),
        *("--optim.global_batch", str(GLOBAL_BATCH), "--optim.norm_group", "4", "--eval.baselines", "no"),
        *("--optim.epochs", str(STEPS * GLOBAL_BATCH / NUM_ROWS), "--checkpoint.every_steps", "9"),
        *("--objective.name", "nce", "--objective.z", "ema", "--objective.num_negatives", "64"),
        *("--system.tensorboard", "no", "--checkpoint.every_minutes", "none"),
    ]


def finish(root: Path, run: Path, workers: int) -> None:
    done = subprocess.run(command(root, run, workers), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def manifests(run: Path) -> list[ManifestId]:
    folder = run / "checkpoints" / "manifests"
    found = [ManifestId.from_key(f"manifests/{path.name}") for path in folder.glob("*.json")]
    return sorted(id for id in found if id is not None)


def kill_at_a_random_moment(root: Path, run: Path, whom: str, chance: random.Random) -> None:
    """Start the run, wait for its first new checkpoint and a little more, and kill the driver or one worker."""
    before = manifests(run)
    driver = subprocess.Popen(command(root, run, 3), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    started_s = time.monotonic()
    while manifests(run) == before:
        assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
        assert time.monotonic() - started_s < START_TIMEOUT_S
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.8))
    family = psutil.Process(driver.pid).children(recursive=True)
    # The driver's own children are the fork server and its kin; the workers are the fork server's.
    workers = [process for process in family if process.ppid() != driver.pid]
    assert len(workers) == 3
    victim = driver.pid if whom == "driver" else chance.choice(workers).pid
    os.kill(victim, signal.SIGKILL)
    driver.communicate(timeout=60)
    assert driver.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def assert_same_to_the_bit(found: Path, expected: Path) -> None:
    ours, theirs = (read_latest(Run(str(run)).checkpoints()) for run in (found, expected))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step == STEPS
    mine, other = ours.tensors(), theirs.tensors()
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    for table in ("bank", "bank_last_step"):
        assert torch.equal(ours.rows(table), theirs.rows(table))
    assert ours.state["normalizer"] == theirs.state["normalizer"]
    assert ours.state["curves"] == theirs.state["curves"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("killed") / "data", NUM_ROWS, 30)


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("killed") / "uninterrupted"
    finish(root, run, 3)
    return run


def test_a_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(root, uninterrupted, tmp_path):
    run = tmp_path / "run"
    chance = random.Random()
    for whom in ("driver", "a worker"):
        kill_at_a_random_moment(root, run, whom, chance)
    finish(root, run, 3)
    assert_same_to_the_bit(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_ten_times_ends_bit_for_bit_like_the_uninterrupted_one(root, uninterrupted, tmp_path):
    run = tmp_path / "run"
    chance = random.Random()
    for _ in range(10):
        kill_at_a_random_moment(root, run, chance.choice(["driver", "a worker"]), chance)
    finish(root, run, 3)
    assert_same_to_the_bit(run, uninterrupted)


def test_a_killed_run_goes_on_with_another_number_of_workers_with_every_row_in_place(root, uninterrupted, tmp_path):
    run = tmp_path / "run"
    kill_at_a_random_moment(root, run, "driver", random.Random())
    stopped_at = manifests(run)[-1]
    finish(root, run, 2)
    ours, theirs = (read_latest(Run(str(r)).checkpoints()) for r in (run, uninterrupted))
    assert ours is not None
    assert theirs is not None
    assert ours.attempt == stopped_at.attempt + 1
    assert 0 < stopped_at.step < STEPS
    assert ours.rows("bank_last_step").tolist() == last_steps(NUM_ROWS, 0, GLOBAL_BATCH, STEPS).tolist()
    assert torch.equal(ours.rows("bank_last_step"), theirs.rows("bank_last_step"))
    torch.testing.assert_close(ours.rows("bank").norm(dim=1), torch.ones(NUM_ROWS))
