"""A run killed with SIGKILL from outside and started again with the same command: bit for bit the uninterrupted one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from killing import assert_same_to_the_bit, finish, kill_at_a_random_moment, manifests
from tiny_data import write_cifar10

from cluster.checkpoint import read_latest
from dataloading.stream import last_steps
from instdisc.runs import Run

NUM_ROWS, GLOBAL_BATCH, STEPS = 103, 12, 240


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


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("killed") / "data", NUM_ROWS, 30)


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("killed") / "uninterrupted"
    finish(command(root, run, 3))
    return run


def test_a_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(root, uninterrupted, tmp_path):
    run = tmp_path / "run"
    chance = random.Random()
    for whom in ("driver", "a worker"):
        kill_at_a_random_moment(command(root, run, 3), run, whom, chance)
    finish(command(root, run, 3))
    assert_same_to_the_bit(run, uninterrupted, STEPS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_ten_times_ends_bit_for_bit_like_the_uninterrupted_one(root, uninterrupted, tmp_path):
    run = tmp_path / "run"
    chance = random.Random()
    for _ in range(10):
        kill_at_a_random_moment(command(root, run, 3), run, chance.choice(["driver", "a worker"]), chance)
    finish(command(root, run, 3))
    assert_same_to_the_bit(run, uninterrupted, STEPS)


def test_a_killed_run_goes_on_with_another_number_of_workers_with_every_row_in_place(root, uninterrupted, tmp_path):
    run = tmp_path / "run"
    kill_at_a_random_moment(command(root, run, 3), run, "driver", random.Random())
    stopped_at = manifests(run)[-1]
    finish(command(root, run, 2))
    ours, theirs = (read_latest(Run(str(r)).checkpoints()) for r in (run, uninterrupted))
    assert ours is not None
    assert theirs is not None
    assert ours.attempt == stopped_at.attempt + 1
    assert 0 < stopped_at.step < STEPS
    assert ours.rows("bank_last_step").tolist() == last_steps(NUM_ROWS, 0, GLOBAL_BATCH, STEPS).tolist()
    assert torch.equal(ours.rows("bank_last_step"), theirs.rows("bank_last_step"))
    torch.testing.assert_close(ours.rows("bank").norm(dim=1), torch.ones(NUM_ROWS))
