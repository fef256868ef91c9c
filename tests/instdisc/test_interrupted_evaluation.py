"""Workers that are asked to end in the middle of an evaluation: they save at once, and the next ones evaluate."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from killing import assert_same_to_the_bit
from tiny_data import write_cifar10

from cluster.checkpoint import read_latest
from cluster.worker import Preempted, Worker
from instdisc.config import TrainConfig
from instdisc.launch import fit
from instdisc.recipes import recipe
from instdisc.runs import Run
from instdisc.train.loop import train

NUM_ROWS, GLOBAL_BATCH, STEPS = 103, 12, 40


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    root = write_cifar10(tmp_path_factory.mktemp("interrupted") / "data", NUM_ROWS, 30)
    return recipe(
        "cifar10-cpu",
        **{
            "data.root": str(root), "data.max_rows": None, "model.architecture": "resnet-small", "model.width": 8,
            "model.blocks": (1, 1), "model.feature_dim": 16, "eval.k": 5, "eval.batch": 2, "eval.every_epochs": 1.0,
            "optim.global_batch": GLOBAL_BATCH, "optim.norm_group": 4, "optim.epochs": STEPS * GLOBAL_BATCH / NUM_ROWS,
            "objective.name": "nce", "objective.z": "ema", "objective.num_negatives": 64, "system.tensorboard": False,
            "checkpoint.every_minutes": None, "checkpoint.max_cost": None, "eval.baselines": True,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("interrupted") / "undisturbed"
    fit(config, run=str(run), workers=0)
    return run


class Interrupter:
    """Asks to stop, as Ctrl-C does, when the n-th embedding of training images has begun."""

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, 0

    def __call__(self, event: dict) -> None:
        text = event.get("text", "")
        if text.startswith("embedding training images: 2 "):
            self.seen += 1
            if self.seen == self.number:
                signal.raise_signal(signal.SIGINT)


def test_ctrl_c_before_the_first_step_ends_at_once_for_nothing_is_there_to_save(config, undisturbed, tmp_path):
    interrupter = Interrupter(1)
    with pytest.raises(KeyboardInterrupt):
        fit(config, run=str(tmp_path / "run"), workers=0, on_event=interrupter)
    assert interrupter.seen == 1
    assert read_latest(Run(str(tmp_path / "run")).checkpoints()) is None
    assert fit(config, run=str(tmp_path / "run"), workers=0).finished
    assert_same_to_the_bit(tmp_path / "run", undisturbed, STEPS)


# After an epoch, and at the end.
@pytest.mark.parametrize(("number", "expected_step", "workers"), [(2, 9, 0), (6, STEPS, 0), (2, 9, 2)])
def test_ctrl_c_in_an_evaluation_does_not_wait_for_it_and_the_next_start_makes_it(
    config, undisturbed, tmp_path, number, expected_step, workers
):
    run = tmp_path / "run"
    interrupter = Interrupter(number)
    result = fit(config, run=str(run), workers=workers, launcher="local", on_event=interrupter)
    assert interrupter.seen == number
    assert not result.finished
    saved = read_latest(Run(str(run)).checkpoints())
    assert saved is not None
    assert saved.step == expected_step
    if workers == 0:
        assert expected_step not in [step for step, _ in saved.state["curves"]["knn_top1"]]
    assert fit(config, run=str(run), workers=workers, launcher="local").finished
    if workers == 0:
        assert_same_to_the_bit(run, undisturbed, STEPS)
    else:
        last = read_latest(Run(str(run)).checkpoints())
        assert last is not None
        expected = read_latest(Run(str(undisturbed)).checkpoints())
        assert expected is not None
        steps = [[step for step, _ in checkpoint.state["curves"]["knn_top1"]] for checkpoint in (last, expected)]
        assert steps[0] == steps[1]


def test_without_baselines_nothing_is_evaluated_before_the_first_step(config, tmp_path):
    seen = Interrupter(-1)
    config = config.with_overrides({"eval.baselines": False})
    result = fit(config, run=str(tmp_path / "run"), workers=0, on_event=seen)
    assert [step for step, _ in result.metrics["knn_top1"]] == [9, 18, 26, 35, STEPS]
    assert seen.seen == 5


@pytest.mark.parametrize(("number", "expected_step"), [(1, None), (3, 18), (6, STEPS)])
def test_a_drain_in_an_evaluation_is_not_kept_waiting(config, undisturbed, tmp_path, number, expected_step):
    run, seen = tmp_path / "run", []

    def send_event(text: str) -> None:
        if json.loads(text).get("text", "").startswith("embedding training images: 2 "):
            seen.append(text)

    place = Run(str(run))
    agreed = place.agree_on_config(config, workers=1)
    worker = Worker(device=torch.device("cpu"), send_event=send_event, poll_leave=lambda: len(seen) >= number)
    with pytest.raises(Preempted):
        train(worker, agreed.to_json(), str(run))
    assert len(seen) == number
    saved = read_latest(place.checkpoints())
    assert (None if saved is None else saved.step) == expected_step
    assert fit(config, run=str(run), workers=0).finished
    assert_same_to_the_bit(run, undisturbed, STEPS)
