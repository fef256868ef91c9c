"""Workers under Ray that are killed from outside: others go on by themselves, in the same command."""

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
from killing import assert_same_to_the_bit, finish
from tiny_data import write_cifar10

from cluster.attempts import read_attempts
from cluster.phase import VARIABLE, read_phase
from cluster.starts import starts_of
from instdisc.runs import Run

NUM_ROWS, GLOBAL_BATCH, STEPS, EVERY = 103, 12, 240, 20
START_TIMEOUT_S, END_TIMEOUT_S = 120, 240


def command(root: Path, run: Path, launcher: str) -> list[str]:
    return [
        *(sys.executable, "-m", "instdisc.cli.main", "train", "cifar10-cpu", "--run", str(run)),
        *("--launcher", launcher, "--workers", "3", "--data.root", str(root), "--data.max_rows", "none"),
        *("--model.architecture", "resnet-small", "--model.width", "8", "--model.blocks", "1,1"),
        *("--model.head", "linear", "--model.feature_dim", "16", "--eval.k", "5", "--eval.every_epochs", "0"),
        *("--optim.global_batch", str(GLOBAL_BATCH), "--optim.norm_group", "4", "--eval.baselines", "no"),
        *("--optim.epochs", str(STEPS * GLOBAL_BATCH / NUM_ROWS), "--checkpoint.every_steps", str(EVERY)),
        *("--objective.name", "nce", "--objective.z", "ema", "--objective.num_negatives", "64"),
        *("--system.tensorboard", "no", "--checkpoint.every_minutes", "none", "--checkpoint.overlap", "wait"),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("restarted") / "data", NUM_ROWS, 30)


def training(phases: Path) -> dict[int, int]:
    """Return the steps that each living worker has made."""
    found = {int(path.name): read_phase(phases, int(path.name)) for path in phases.iterdir()}
    return {pid: step[1] for pid, step in found.items() if step and step[1] > 0 and psutil.pid_exists(pid)}


def wait_for(condition, driver: subprocess.Popen, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_whose_workers_are_killed_goes_on_by_itself_and_ends_bit_for_bit_like_one_that_is_left_alone(
    root, tmp_path
):
    finish(command(root, tmp_path / "expected", "local"))
    run, phases, chance = tmp_path / "run", tmp_path / "phases", random.Random()
    phases.mkdir()
    driver = subprocess.Popen(
        command(root, run, "ray"), env={**os.environ, VARIABLE: str(phases)}, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(
            lambda: len(training(phases)) == 3 and max(training(phases).values()) > 2 * EVERY, driver, START_TIMEOUT_S
        )
        before = training(phases)
        victim = chance.choice(list(before))
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        wait_for(lambda: len(training(phases).keys() - before.keys()) == 3, driver, START_TIMEOUT_S)
        print(f"{time.monotonic() - killed_s:.1f} s from the kill to a step of the last of the new workers")
        _, said = driver.communicate(timeout=END_TIMEOUT_S)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert "died: going on from the newest checkpoint" in said
    assert "continuing from the checkpoint of step" in said, said
    assert sorted(read_attempts(Run(str(run)).checkpoints())) == [1, 2]
    starts = starts_of(read_attempts(Run(str(run)).checkpoints()))
    assert [(start.kind, start.workers) for start in starts] == [("start", 3), ("failure", 3)]
    assert "died" in starts[1].text
    assert f"s ({starts[1].text})" in said.partition("went on after ")[2], "the time is told with the cause"
    assert_same_to_the_bit(run, tmp_path / "expected", STEPS)
